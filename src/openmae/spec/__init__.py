"""The spec: its options, actions and metrics, and the code that reads and checks it."""
