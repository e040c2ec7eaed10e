"""INT8 for the edge: quantisation-aware training with NNCF, export to OpenVINO."""
