// SIMD exp2, softplus and sigmoid of the CPU kernels, to be included once per Highway target (after
// hwy/foreach_target.h). Written by the scan's author; conv1d and others share it.
