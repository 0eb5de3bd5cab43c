"""Numbers to minimise: functions of tensors that know no config, no device and no logger."""
