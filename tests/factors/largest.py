"""The size of the largest tensor that some work makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes; views of what it was given are none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {self.place(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.place(tensor) not in given:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result

    @staticmethod
    def place(tensor):
        return tensor.untyped_storage().data_ptr()
