// int8: signed bytes from -127 to 127 and a scale for each block, kept as absmax.h says.
#pragma once

// A block's scale is its largest magnitude / 127, and a byte is w * (127 / largest magnitude), rounded to the nearest
// whole number, half to even. A magnitude below the least one counts as it, so that scale and factor are normal
// numbers.
#define LOWRANK_INT8_LARGEST 127.0f
#define LOWRANK_INT8_LEAST_ABSMAX 0x1p-119f

// Adding this number to a float32 below 2^22 rounds it to a whole number, half to even, whose low byte ends the sum's
// bits.
#define LOWRANK_INT8_ROUNDER 0x1.8p23f
