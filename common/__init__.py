"""Device ops of GPT-OSS in Triton, one a file, and the machines that they run on, one a folder: see machine.py."""
