"""What is computed: pure torch, no files, no clocks."""
