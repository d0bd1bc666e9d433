"""Train any PyTorch model without a backward pass: multi-tangent forward gradients."""
