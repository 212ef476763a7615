"""LoRAs for any model and any mm_type: added to the weights as they load, or computed beside them."""
