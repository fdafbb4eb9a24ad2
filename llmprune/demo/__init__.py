"""The bundled demonstration model and the text it is trained, calibrated and evaluated on."""
