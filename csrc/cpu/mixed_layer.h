// The linear layers of some models, each a mix of N experts' layers: one model for every sample.
//
//   y_st = f(sum_i w_si (W_i x_st + b_i))            samples s, their rows t
//
// Two ways, by rows and N alone, so that a sample's bits depend on nothing but the sample:
//   mix weights   a tile of sum_i w_si W_i, in cache, times the rows of sample s:
//                 O I (N + T) multiply-adds a sample
//   mix results   a tile of W_i times the rows of all samples, and w_si times that added up:
//                 O I N T multiply-adds a sample, but each tile is made once, for many samples
// Work is cut into kTileOutputs outputs and up to kGroupRows rows.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/activation.h"
#include "cpu/layer_tiles.h"

namespace neulig_fast {

constexpr int64_t kGroupRows = 512;  // their sums fit half of a second-level cache twice

struct LayerShape {
  int64_t samples, rows, inputs, experts, outputs;  // B, T, I, N, O
};

// Rows of one sample.
struct Piece {
  int64_t sample, begin, rows;
};

// f(sums + shift) of some rows of one sample, rounded to T.
template <typename T>
struct Finish {
  const Acc<T>* sums;
  const Acc<T>* shift;  // kTileOutputs of them
  int64_t rows, outputs;
  Activation activation;
  T* y;
  int64_t y_stride;

  template <int kBytes>
  static NF_INLINE void run(const Finish& f) {
    constexpr int kLanes = kBytes / sizeof(Acc<T>);
    for (int64_t row = 0; row < f.rows; ++row) {
      T padded[kTileOutputs];
      T* to = f.outputs == kTileOutputs ? f.y + row * f.y_stride : padded;
      for (int64_t o = 0; o < kTileOutputs; o += kLanes) {
        const auto sum = load<kLanes>(f.sums + row * kTileOutputs + o);
        store<kLanes>(to + o, activate<kLanes>(f.activation, sum + load<kLanes>(f.shift + o)));
      }
      if (to == padded) std::copy_n(padded, f.outputs, f.y + row * f.y_stride);
    }
  }
};

// total += coef * sums of some rows of one sample.
template <typename A>
struct AddScaled {
  const A* sums;
  A* totals;
  A coef;
  int64_t rows;

  template <int kBytes>
  static NF_INLINE void run(const AddScaled& a) {
    constexpr int kLanes = kBytes / sizeof(A);
    const auto w = broadcast<kBytes, Vec<A, kLanes>>(a.coef);
    for (int64_t k = 0; k < a.rows * kTileOutputs; k += kLanes)
      store<kLanes>(a.totals + k,
                    product_sum<kBytes>(w, load<kLanes>(a.sums + k), load<kLanes>(a.totals + k)));
  }
};

template <typename T>
struct MixedLayer {
  using A = Acc<T>;

  LayerShape shape;
  const A* x;        // rows one after the other
  int64_t x_stride;  // from one sample to the next; 0: all have the same rows
  const T* weight;
  int64_t weight_stride, output_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  Activation activation;
  T* y;
  bool by_weights;  // else by results; then x holds the rows of all samples in a row
  // The experts that take part in sample s: [starts[s], starts[s + 1])
  std::vector<int64_t> starts, experts;
  std::vector<A> coef;
  std::vector<Piece> pieces;
  std::vector<int64_t> groups;  // first piece of each, and the number of pieces
  KernelFn<MixTiles<T>> mix = kernel_at<MixTiles<T>, MixTiles<T>>(cpu_level());
  KernelFn<ProductRows<A>> product = kernel_at<ProductRows<A>, ProductRows<A>>(cpu_level());
  KernelFn<AddScaled<A>> add = kernel_at<AddScaled<A>, AddScaled<A>>(cpu_level());
  KernelFn<Finish<T>> finish = kernel_at<Finish<T>, Finish<T>>(cpu_level());

  // Rows of coefficients (samples, N): an expert whose coefficient is zero takes no part.
  void choose_experts(const A* w) {
    starts.push_back(0);
    for (int64_t s = 0; s < shape.samples; ++s) {
      for (int64_t i = 0; i < shape.experts; ++i)
        if (w[s * shape.experts + i] != 0) {
          experts.push_back(i);
          coef.push_back(w[s * shape.experts + i]);
        }
      starts.push_back(static_cast<int64_t>(experts.size()));
    }
  }

  void cut_rows() {
    int64_t held = kGroupRows;
    for (int64_t s = 0; s < shape.samples; ++s)
      for (int64_t begin = 0; begin < shape.rows; begin += kGroupRows) {
        const int64_t rows = std::min(kGroupRows, shape.rows - begin);
        if (held + rows > kGroupRows) {
          groups.push_back(static_cast<int64_t>(pieces.size()));
          held = 0;
        }
        pieces.push_back({s, begin, rows});
        held += rows;
      }
    groups.push_back(static_cast<int64_t>(pieces.size()));
  }

  // What a thread works in.
  struct Workspace {
    std::vector<A> tiles = std::vector<A>(MixTiles<T>::kMostSamples * kTileOutputs * kTileDepth);
    std::vector<A> sums = std::vector<A>(kTileOutputs * kGroupRows);
    std::vector<A> totals = std::vector<A>(kTileOutputs * kGroupRows);
  };

  void mix_tiles(const int64_t* who, const A* w, int64_t count, int64_t samples, int64_t output,
                 int64_t input, int64_t depth, A* tiles) const {
    mix({weight + output * output_stride + input, weight_stride, output_stride, who, w, count,
         samples, std::min(kTileOutputs, shape.outputs - output), depth, tiles});
  }

  // How many samples from this one on, in which the same experts take part, are mixed at once.
  int64_t alike(const Piece* begin, const Piece* end) const {
    const auto who = experts.begin();
    const auto first = who + starts[begin->sample], last = who + starts[begin->sample + 1];
    const Piece* p = begin + 1;
    for (; p < end && p - begin < MixTiles<T>::kMostSamples; ++p)
      if (!std::equal(first, last, who + starts[p->sample], who + starts[p->sample + 1])) break;
    return p - begin;
  }

  void multiply(const Piece& piece, int64_t input, int64_t depth, const A* tile, A* sums) const {
    const A* from = x + piece.sample * x_stride + piece.begin * shape.inputs + input;
    product({from, shape.inputs, piece.rows, depth, tile, sums, input == 0});
  }

  void mix_weights(const Piece* begin, const Piece* end, int64_t output, Workspace& space) const {
    for (int64_t input = 0; input < shape.inputs; input += kTileDepth) {
      const int64_t depth = std::min(kTileDepth, shape.inputs - input);
      A* sums = space.totals.data();
      for (const Piece* p = begin; p < end;) {
        const int64_t first = starts[p->sample], samples = alike(p, end);
        const int64_t count = starts[p->sample + 1] - first;
        mix_tiles(experts.data() + first, coef.data() + first, count, samples, output, input, depth,
                  space.tiles.data());
        for (int64_t s = 0; s < samples; ++s, sums += p++->rows * kTileOutputs) {
          // Weights of no expert are zeros, but zero times infinity is not.
          if (count == 0) std::fill_n(sums, p->rows * kTileOutputs, A(0));
          else multiply(*p, input, depth, &space.tiles[s * kTileOutputs * kTileDepth], sums);
        }
      }
    }
  }

  // The coefficient of expert i in a sample, or null where it takes no part.
  const A* share(int64_t sample, int64_t i) const {
    const auto end = experts.begin() + starts[sample + 1];
    const auto at = std::find(experts.begin() + starts[sample], end, i);
    return at == end ? nullptr : &coef[at - experts.begin()];
  }

  void mix_results(const Piece* begin, const Piece* end, int64_t output, Workspace& space) const {
    const A one = 1;
    std::fill(space.totals.begin(), space.totals.end(), A(0));
    for (int64_t i = 0; i < shape.experts; ++i) {
      if (std::none_of(begin, end, [&](const Piece& p) { return share(p.sample, i); })) continue;
      for (int64_t input = 0; input < shape.inputs; input += kTileDepth) {
        const int64_t depth = std::min(kTileDepth, shape.inputs - input);
        mix_tiles(&i, &one, 1, 1, output, input, depth, space.tiles.data());
        // Pieces of consecutive samples are consecutive rows.
        const int64_t rows = (end[-1].sample - begin->sample) * shape.rows + end[-1].begin +
                             end[-1].rows - begin->begin;
        multiply({begin->sample, begin->begin, rows}, input, depth, space.tiles.data(),
                 space.sums.data());
      }
      int64_t row = 0;
      for (const Piece* p = begin; p < end; row += p++->rows)
        if (const A* w = share(p->sample, i))
          add({&space.sums[row * kTileOutputs], &space.totals[row * kTileOutputs], *w, p->rows});
    }
  }

  int64_t output_tiles() const {
    return (shape.outputs + kTileOutputs - 1) / kTileOutputs;
  }

  void item(int64_t index) const {
    static thread_local Workspace space;
    const int64_t count = static_cast<int64_t>(groups.size()) - 1;
    // What is larger, the experts' weights or the rows, comes from memory once.
    const bool weights = shape.experts * shape.outputs > shape.samples * shape.rows;
    const int64_t output = (weights ? index / count : index % output_tiles()) * kTileOutputs;
    const int64_t group = weights ? index % count : index / output_tiles();
    const Piece *begin = pieces.data() + groups[group], *end = pieces.data() + groups[group + 1];
    if (shape.inputs == 0) std::fill(space.totals.begin(), space.totals.end(), A(0));
    else if (by_weights) mix_weights(begin, end, output, space);
    else mix_results(begin, end, output, space);
    int64_t row = 0;
    for (const Piece* p = begin; p < end; row += p++->rows) {
      A shift[kTileOutputs] = {};
      add_bias(p->sample, output, shift);
      T* to = y + (p->sample * shape.rows + p->begin) * shape.outputs + output;
      finish({&space.totals[row * kTileOutputs], shift, p->rows,
              std::min(kTileOutputs, shape.outputs - output), activation, to, shape.outputs});
    }
  }

  void add_bias(int64_t sample, int64_t output, A* shift) const {
    const int64_t count = bias == nullptr ? 0 : std::min(kTileOutputs, shape.outputs - output);
    for (int64_t k = starts[sample]; k < starts[sample + 1]; ++k)
      for (int64_t o = 0; o < count; ++o)
        shift[o] += coef[k] * load<1>(bias + experts[k] * bias_stride + output + o)[0];
  }

  void all() {
    cut_rows();
    const int64_t work = shape.samples * shape.rows * shape.inputs * shape.outputs;
    for_each_item(output_tiles() * (static_cast<int64_t>(groups.size()) - 1), work / 16,
                  [&](int64_t index) { item(index); });
  }
};

// What is asked of weight (N, O, I) and bias (N, O), and of the number of an activation.
inline void check_layer(const char* op, const Tensor& weight, const std::optional<Tensor>& bias,
                        int64_t activation) {
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) >= 1, op, ": weight must be (N, O, I), got ",
                  shape_text(weight));
  check_inner_stride(op, "weight", weight);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == weight.size(0) &&
                        bias->size(1) == weight.size(1) &&
                        bias->scalar_type() == weight.scalar_type(),
                    op, ": bias must be (N, O) in weight's dtype, got ", shape_text(*bias));
    check_inner_stride(op, "bias", *bias);
  }
  STD_TORCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount), op,
                  ": no activation ", activation);
}

// Those of the experts' tensors, of x and of y that a layer reads and writes.
template <typename T>
MixedLayer<T> mixed_layer(const LayerShape& shape, const Tensor& y, const Tensor& x,
                          const Tensor& weight, const std::optional<Tensor>& bias,
                          int64_t activation) {
  MixedLayer<T> layer;
  layer.shape = shape;
  layer.x = static_cast<const Acc<T>*>(x.const_data_ptr());
  layer.x_stride = x.dim() == 2 ? 0 : shape.rows * shape.inputs;
  layer.weight = static_cast<const T*>(weight.const_data_ptr());
  layer.weight_stride = weight.stride(0);
  layer.output_stride = weight.stride(1);
  layer.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  layer.bias_stride = bias ? bias->stride(0) : 0;
  layer.activation = static_cast<Activation>(activation);
  layer.y = static_cast<T*>(y.mutable_data_ptr());
  // Mixing a tile costs as much as some rows and a little more per expert; the numbers are fitted
  // to times of both ways for 2 to 16 experts and 1 to 12 rows (AVX2). Other rules would be right
  // too.
  layer.by_weights = 5 * shape.rows * (shape.experts - 1) >= 55 + 6 * shape.experts;
  return layer;
}

}  // namespace neulig_fast
