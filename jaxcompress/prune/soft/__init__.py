"""Gates and thresholds that are trained."""
