"""Named configurations."""

from multitangent_lab.config._train import CompareConfig, TrainConfig

# Section IV-D: the widest network of the paper, on MNIST.
TRAIN_PRESETS = {
    "paper": TrainConfig(dataset="mnist", width=4096, gradient="projection"),
    "demo": TrainConfig(width=64, epochs=60),
}
COMPARE_PRESETS = {
    "paper": CompareConfig(
        dataset="mnist",
        width=4096,
        gradients=("backpropagation", "single", "mean", "projection"),
    ),
    "demo": CompareConfig(width=64, epochs=60),
}
