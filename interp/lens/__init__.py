"""TransformerLens's own tools on an MLLM: `cache` its `ActivationCache`, with sums that are right
here; `view` what those tools ask of a model; `bridge` the same weights as a `TransformerBridge`."""
