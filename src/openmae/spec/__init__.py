"""The spec: options, actions, metrics, and how a spec is read and checked."""
