"""An evaluation as one HTML page without anything outside of it."""
