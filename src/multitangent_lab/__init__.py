"""The laboratory around multitangent: data, models, training, experiments, benchmarks, commands."""
