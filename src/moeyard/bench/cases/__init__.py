"""One module per operator that can be measured. Each has an `OPERATOR` (see `moeyard.bench.operators.Operator`)."""
