"""Triton kernels of lowrank_ops: tensors in, launches, tensors out.

======================  ===========================================================================
``nf4``                 quantise and dequantise weights, in NF4 and the other formats
``adapted_linear``      y = W x + bias + s · U C (D drop(x)), forward and backward
``adapted_linear_few``  its kernels of few tokens, which decode W in registers
``svd_linear``          y = U C (Vt x) + bias, forward and backward
``routed_linear``       every token with an update of its own added onto y = W x + bias
``preference``          the Bradley–Terry loss of pairs, forward and backward
``core``                the core C as a tile inside other kernels; sums over tokens, the gradient of C among them
``matrix``              tiles of a matrix, decoded in registers, inside other kernels
``dropout``             the dropout mask inside other kernels
``arena_layout``        the fields of a row of an arena's table
``operands``            how launchers are given a matrix and a core, and what a format is
``config``              tile sizes: a pure function of the shape and the GPU, needs no GPU
``launch``              the one place that starts a kernel; also records launches for ``aot``
``aot``                 compiles every kernel for every target without a GPU and reports its resources
======================  ===========================================================================

A launcher is an ordinary function, e.g. ``adapted_linear.forward(x, weight, ..., form="few")``. It takes tensors of one
device, allocates its results there, launches on the current stream and never synchronises. It checks nothing but what
Triton could get silently wrong; shapes and dtypes are checked above it.

A kernel takes a matrix, a core and a dropout as one NamedTuple argument each (:func:`matrix.matrix_argument`,
:func:`core.core_arguments`, :func:`dropout.dropout_argument`). What is absent is a tuple of None, for Triton 3.6 cannot
compare a tuple with None. Members that are known when compiling are wrapped by :func:`launch.constant`.
``do_not_specialize`` holds for a whole argument, which is why the size of a core stands beside it. No member is called
``values`` or ``type``: Triton's tuples have attributes of these names.

Importing a module of this package needs triton, not a GPU. With ``TRITON_INTERPRET=1`` set before the import the same
launchers run on CPU tensors in float32 and float16.
"""
