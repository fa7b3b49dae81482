// Swap local search for a partition of an expert's neurons into equal groups.
#pragma once

#include <cstdint>

namespace prism {

// mass [neurons, tokens] fp32, neuron-major; order: a permutation of the neurons, of which each
// neurons / groups in a row are one group; changed in place. Maximises the mean over tokens of the mass
// in the groups / 2 heaviest groups: a proposal swaps two neurons of different groups and stays if the
// objective does not fall. Gives the final objective. Same seed, same result, on every machine.
double swap_search(const float* mass, int64_t neurons, int64_t tokens, int64_t groups,
                   int64_t proposals, uint64_t seed, int32_t* order);

}  // namespace prism
