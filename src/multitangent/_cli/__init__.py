"""What the command line consists of; `multitangent.cli` puts it together."""
