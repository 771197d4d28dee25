"""What the compilers make of the kernels, without a GPU: `python -m bench.static`.

Every launcher is called with CPU tensors while its launches are recorded instead of executed; each kernel is compiled
through Triton's own JIT for the case's arguments, and three things are read from it:

traffic    from the TTIR, by evaluating the addresses and masks of every load and store for every program of the grid.
           *bytes*: what each load or store instruction of the kernel touches, each byte once, summed over these
           instructions (a second pass over a tensor counts again) and over the launches. *requested*: the same with
           every repeated visit counted. *least*: each input and each output of the op once.
code       from SASS or GCN: registers, spills (instructions that access local memory), stack, shared memory, widths of
           global accesses. *instructions* and *special functions* are per element of the case's largest tensor: each
           basic block counts as often as its loop iterates, with the trip counts of the TTIR; both sides of other
           branches count, so the figure is an upper bound. Of GCN only vector instructions count.
products   floating-point operations of `tl.dot`, from the TTIR's shapes and trip counts, padding included.
model      the time of `bench.chips` from these figures. A model: not measured.

Operations that a launcher leaves to PyTorch (fills, sums, copies) count as launches, their inputs and outputs as bytes.
Nothing is random and nothing is timed: the same sources, Triton and PyTorch give the same figures on every machine.
"""
