// Many steps of Adam on NeuLig's Portland over cached features                 (neulig_fit, CPU)
//
// neulig_fast/ops/neulig_fit.py has the formulas and the arguments. Everything is in the
// accumulation type, fp32 (fp64 for fp64 features); loss terms are summed in fp64. Sums have a
// fixed order: 16 lanes over columns, samples in order within groups of 32, then groups in order.
// The bits do not depend on threads or instruction set.
//
// Per sample and step, from memory: N D features, N C products, N N inner products, once each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "cpu/neulig_fit_steps.h"

namespace neulig_fast {
namespace {

using Tensors = std::vector<Tensor>;

struct FitArguments {
  const Tensor& state;
  const Tensors &features, &products, &grams, &biases, &labels, &rows;
  const Tensor& alignment;
  int64_t step, batch;
  double lr, scaling;
  bool centered;
};

void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                  const std::vector<int64_t>& sizes) {
  check_exact("neulig_fit", name, tensor, dtype, sizes);
}

void check_list(const char* name, size_t count, size_t expected) {
  STD_TORCH_CHECK(count == expected, "neulig_fit: ", name, " must be one tensor per task, ",
                  expected, ", got ", count);
}

// Rows and labels index memory: each is looked at before any is used.
void check_values(const Tensor& rows, const Tensor* labels, int64_t samples, int64_t classes) {
  const auto* row = static_cast<const int64_t*>(rows.const_data_ptr());
  const auto* label =
      labels == nullptr ? nullptr : static_cast<const int64_t*>(labels->const_data_ptr());
  for (int64_t k = 0; k < rows.size(0); ++k) {
    STD_TORCH_CHECK(row[k] >= 0 && row[k] < samples, "neulig_fit: rows must be in [0, ", samples,
                    "), got ", row[k]);
    STD_TORCH_CHECK(label == nullptr || (label[row[k]] >= 0 && label[row[k]] < classes),
                    "neulig_fit: labels must be in [0, ", classes, "), got ", label[row[k]]);
  }
}

// The number of rounds.
int64_t check_arguments(const FitArguments& a) {
  const size_t count = a.features.size();
  STD_TORCH_CHECK(count > 0 && a.features[0].dim() == 3 && a.batch > 0,
                  "neulig_fit: features must be tensors (M, N, D), at least one; batch positive");
  check_list("products", a.products.size(), count);
  check_list("grams", a.grams.size(), count);
  check_list("biases", a.biases.size(), count);
  check_list("rows", a.rows.size(), count);
  if (!a.labels.empty()) check_list("labels", a.labels.size(), count);
  const int64_t n = a.features[0].size(1), d = a.features[0].size(2);
  STD_TORCH_CHECK(n >= 1 && n <= kMaxExperts && d >= 1,
                  "neulig_fit: N must be 1 to 64 and D positive, got ", n, " and ", d);
  const ScalarType dtype = a.features[0].scalar_type(), acc = acc_dtype(dtype);
  check_float("neulig_fit", "features", dtype);
  check_tensor("state", a.state, acc, {3, n * n * d + n});
  check_tensor("alignment", a.alignment, acc, {n, n});
  int64_t rounds = 0;
  for (size_t t = 0; t < count; ++t) {
    const int64_t m = a.features[t].size(0);
    check_tensor("features", a.features[t], dtype, {m, n, d});
    check_tensor("products", a.products[t], acc, {m, n, -1});
    const int64_t c = a.products[t].size(2);
    check_tensor("biases", a.biases[t], acc, {c});
    if (a.grams[t].numel() > 0) check_tensor("grams", a.grams[t], acc, {m, n, n});
    check_tensor("rows", a.rows[t], ScalarType::Long, {-1});
    if (!a.labels.empty()) check_tensor("labels", a.labels[t], ScalarType::Long, {m});
    const int64_t own = (a.rows[t].size(0) + a.batch - 1) / a.batch;
    STD_TORCH_CHECK(c >= 1 && (t == 0 || own == rounds),
                    "neulig_fit: rows must make as many batches for every task, got ", rounds,
                    " and ", own);
    rounds = own;
    check_values(a.rows[t], a.labels.empty() ? nullptr : &a.labels[t], m, c);
  }
  return rounds;
}

template <typename T>
FitTask<T> task_of(const FitArguments& a, size_t t) {
  using A = Acc<T>;
  const int64_t classes = a.products[t].size(2);
  std::vector<A> bias(whole_steps(classes), -std::numeric_limits<A>::infinity());
  const auto* given = static_cast<const A*>(a.biases[t].const_data_ptr());
  std::copy(given, given + classes, bias.begin());
  const auto numbers = [](const Tensor& tensor) {
    return static_cast<const int64_t*>(tensor.const_data_ptr());
  };
  const bool normalize = a.grams[t].numel() > 0;
  return {static_cast<const T*>(a.features[t].const_data_ptr()),
          static_cast<const A*>(a.products[t].const_data_ptr()),
          normalize ? static_cast<const A*>(a.grams[t].const_data_ptr()) : nullptr,
          std::move(bias),
          a.labels.empty() ? nullptr : numbers(a.labels[t]),
          numbers(a.rows[t]),
          a.rows[t].size(0),
          classes};
}

template <typename T>
void run(const FitArguments& a, int64_t rounds, const Tensor& state, const Tensor& terms) {
  using A = Acc<T>;
  cpu_level();  // one that cannot be is an error here, not where threads wait for each other
  const int64_t n = a.features[0].size(1);
  const auto* alignment = static_cast<const A*>(a.alignment.const_data_ptr());
  std::vector<A> both(n * n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) both[i * n + j] = alignment[i * n + j] + alignment[j * n + i];
  const FitSettings<A> settings{
      n, a.features[0].size(2), std::move(both), a.step, a.batch, a.lr, a.scaling, a.centered};
  std::vector<FitTask<T>> tasks;
  for (size_t t = 0; t < a.features.size(); ++t) tasks.push_back(task_of<T>(a, t));
  auto* values = static_cast<A*>(state.mutable_data_ptr());
  FitSteps<T> steps(tasks, settings, static_cast<A*>(terms.mutable_data_ptr()));
  steps.copy_state(values, false);
  steps.run(rounds);
  steps.copy_state(values, true);
}

std::tuple<Tensor, Tensor> neulig_fit(const Tensor& state, const Tensors& features,
                                      const Tensors& products, const Tensors& grams,
                                      const Tensors& biases, const Tensors& labels,
                                      const Tensors& rows, const Tensor& alignment, int64_t step,
                                      int64_t batch, double lr, double scaling, bool centered) {
  const FitArguments arguments{state,     features, products, grams, biases,  labels,  rows,
                               alignment, step,     batch,    lr,    scaling, centered};
  const int64_t rounds = check_arguments(arguments);
  Tensor result = torch::stable::clone(state);
  const std::vector<int64_t> sizes = {rounds, static_cast<int64_t>(features.size()), 2};
  Tensor terms = torch::stable::new_empty(state, sizes);
  visit_dtype(features[0].scalar_type(),
              [&](auto element) { run<decltype(element)>(arguments, rounds, result, terms); });
  return {result, terms};
}

}  // namespace
}  // namespace neulig_fast

STABLE_TORCH_LIBRARY_IMPL(neulig_fast_C, CPU, m) {
  m.impl("neulig_fit", TORCH_BOX(&neulig_fast::neulig_fit));
}
