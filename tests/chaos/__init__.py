"""Kill anything at any moment, at random and by the hundred, and see from the files alone what became of the rows.

`python -m tests.chaos --rows 20000 --kills 200 --seed 1` runs a workflow without a model on real processes. The
verdict compares the output with the input, and reads what handlers wrote when they were called; nothing that
matrix-bus counts of itself goes into it.
"""
