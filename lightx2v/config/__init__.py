"""Settings of a run: schema, loading and LightX2V's old names."""
