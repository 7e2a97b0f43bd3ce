#include "adapters.hpp"

TL_DECLARE_PER_ISA(AdapterKernels, adapter_kernels)
TL_DEFINE_PER_ISA(AdapterKernels, adapter_kernels)

namespace tokenloom {

void AdapterPlan::build(int64_t num_slots) {
    const int64_t rows = static_cast<int64_t>(slots.size());
    active = std::any_of(slots.begin(), slots.end(), [](int32_t slot) { return slot >= 0; });
    pieces.clear();
    if (!active) return;
    groups.reserve(rows, num_slots);
    groups.build(rows, num_slots, [&](int64_t row) { return static_cast<int64_t>(slots[static_cast<size_t>(row)]); });
    for (int64_t i = 0; i < groups.count(); ++i) {
        const RowGroups::Group& group = groups.group(i);
        for (int64_t begin = group.begin; begin < group.end; begin += kShrinkRows)
            pieces.push_back({static_cast<int32_t>(group.key), begin, std::min(begin + kShrinkRows, group.end)});
    }
}

}  // namespace tokenloom
