"""How do other people's checkpoints become our parameters, and ours theirs?

`safetensors_file` reads and writes one file, `source` is whatever holds named
tensors, `transforms` and `layout` describe how their tensors map to ours, and
`engine` applies such a description in both directions, checking everything
before it reads anything. The floor knows no model and no module system.
"""
