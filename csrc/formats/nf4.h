// NF4: quantiles of a normal distribution, including 0. Scales: absmax.h.
#pragma once

// The index is the nibble.
#define LOWRANK_NF4_LEVELS                                                                                             \
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f, 0.0795803f,        \
        0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f

// Midpoints of neighbouring levels. The nibble of a scaled weight is the number of thresholds below it.
#define LOWRANK_NF4_THRESHOLDS                                                                                         \
    -0.8480964f, -0.6106329f, -0.45999527f, -0.33967942f, -0.2346074f, -0.13791174f, -0.045525018f, 0.03979015f,       \
        0.12025525f, 0.20352125f, 0.29201376f, 0.38931254f, 0.50166345f, 0.6427869f, 0.86147845f
