"""Remove experts: by a metric, by an expert list, by calibration forwards, or by hand."""
