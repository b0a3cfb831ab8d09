"""From a checkpoint to a folder that OpenVINO runs."""
