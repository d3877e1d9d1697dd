"""Experiments: tasks, the training loop, benchmarks, tables and figures behind the command.

- `tasks`: a task is one entry of a table: data, model, loss, budget, settings per optimizer;
- `optimizers`: the optimizers that a task can be trained with, as a table too;
- `training`: one training run: the loop, its log, its checkpoints, how it stops and goes on;
- `suite`: several optimizers and seeds in one output folder;
- `curves`, `tables`, `figures`: what the logs say;
- `bench`: this package's backward pass against those of its hosts.
"""
