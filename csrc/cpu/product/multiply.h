// The product of a frozen matrix with a batch. Included by files that are compiled once per instruction set.
#pragma once

#include "cpu/product/few_tokens.h"
#include "cpu/product/many_words.h"

namespace lowrank::cpu::LOWRANK_ISA {
namespace {

void multiply(const Product& a, bool many) {
    if (!many)
        multiply_few(a);
    else if (in_many_words(a))
        multiply_many_words<Words>(a);
    else
        with_units(a.x.dtype, [&](auto units) { multiply_many<decltype(units)>(a); });
}

} // namespace
} // namespace lowrank::cpu::LOWRANK_ISA
