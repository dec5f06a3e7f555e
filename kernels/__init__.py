"""Triton kernels of lowrank_ops: tensors in, launches, tensors out.

======================  ===========================================================================
a family of ops         its equation, kernels and launchers, e.g. ``svd_linear``
``adapted_linear_few``  the kernels of ``adapted_linear`` for few tokens, which decode W in registers
``core``                applies the core C inside other kernels; sums over tokens, such as the gradient of C
``matrix``              reads tiles of a matrix inside other kernels and decodes them in registers
``expert_rows``         finds the rows of an expert inside other kernels
``dropout``             makes the dropout mask inside other kernels
``arena_layout``        the fields of a row of an arena's table
``operands``            the types of the matrices, cores and formats that launchers take
``config``              tile sizes: a pure function of the shape and the GPU, needs no GPU
``launch``              starts every kernel; records launches for ``aot``
``aot``                 compiles every kernel for every target without a GPU and reports its resources
======================  ===========================================================================

A launcher is an ordinary function, e.g. ``adapted_linear.forward(x, weight, ..., form="few")``. It takes tensors of one
device, allocates its results there, launches on the current stream and never synchronises. It checks only what Triton
would get wrong silently; its callers check shapes and dtypes.

A kernel takes a matrix, a core and a dropout as one NamedTuple argument each (:func:`matrix.matrix_argument`,
:func:`core.core_arguments`, :func:`dropout.dropout_argument`). An absent operand is a tuple of None, because Triton 3.6
cannot compare a tuple with None. :func:`launch.constant` wraps members that are known when compiling.
``do_not_specialize`` holds for a whole argument, so the size of a core is an argument of its own. No member is called
``values`` or ``type``, because Triton's tuples have attributes of these names.

Importing a module of this package needs triton, not a GPU. With ``TRITON_INTERPRET=1`` set before the import the same
launchers run on CPU tensors in float32 and float16.
"""
