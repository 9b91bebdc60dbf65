// How the CPU kernels cut rows.
#pragma once

namespace neulig_fast {

constexpr int kStep = 16;  // columns that one step keeps in registers

}  // namespace neulig_fast
