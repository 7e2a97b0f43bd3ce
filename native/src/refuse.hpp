#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tokenloom {

// What the caller named does not exist or does not fit; Python sees a ValueError.
[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }
inline std::string number(int64_t value) { return std::to_string(value); }

}  // namespace tokenloom
