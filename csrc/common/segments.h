// The column ranges of a row that share one set of coefficients. No torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace neulig_fast {

// Segment s covers the columns [bounds[s], bounds[s + 1]); bounds ascend from 0 to the row's width.
struct Segments {
  const int64_t* bounds;
  int64_t count;
};

// Calls body(segment, begin, end) for every non-empty piece of [begin, end) inside one segment.
template <typename Body>
inline void for_each_piece(const Segments& segments, int64_t begin, int64_t end, const Body& body) {
  const int64_t* last = segments.bounds + segments.count;
  int64_t segment = std::upper_bound(segments.bounds, last, begin) - segments.bounds - 1;
  for (; begin < end; ++segment) {
    const int64_t stop = std::min(end, segments.bounds[segment + 1]);
    if (begin < stop) body(segment, begin, stop);
    begin = std::max(begin, stop);
  }
}

// Columns [begin, end) of one segment, starting a whole number of items after its start.
struct Item {
  int64_t segment, begin, end;
};

// Every segment in items of at most `columns` columns.
inline std::vector<Item> cut_items(const Segments& segments, int64_t columns) {
  std::vector<Item> items;
  for (int64_t s = 0; s < segments.count; ++s)
    for (int64_t p = segments.bounds[s]; p < segments.bounds[s + 1]; p += columns)
      items.push_back({s, p, std::min(p + columns, segments.bounds[s + 1])});
  return items;
}

}  // namespace neulig_fast
