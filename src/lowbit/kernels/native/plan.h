// How a pass with a grid goes through a tensor: run by run.
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "passes.h"
#include "rounding.h"
#include "runs.h"

namespace lowbit {
namespace {

// How a tensor is worked on: `records` of `length` numbers, in runs of at most `run`. A run has one scale, or a scale
// for each number; what differs between the numbers of a run stands in tables, read from where the run lies in its
// record, or, `tiled`, from their beginning, since every run of a record is alike.
struct Plan {
    std::vector<float> scale, reciprocal, zero;
    std::vector<uint32_t> numbers;
    int64_t records, length, run;
    bool per_number = false, tiled = false, by_reciprocal = true, rows;
    QuantizeRun quantize = nullptr;
    Grid grid;
    View view;

    Plan(const View& v, const Grid& g, bool by_outer) : grid(g), view(v) {
        const bool many = g.scales > 1;
        int64_t repeat = 1, times = 1;
        rows = v.channels_last && (many || g.stochastic);  // channels are what a run goes along
        run = kRun;
        if (rows && v.channels <= kRun) {
            times = std::min(kRun / v.channels, std::max<int64_t>(v.inner, 1));
            records = v.outer, length = v.inner * v.channels, run = times * v.channels;
            per_number = many, tiled = true;
        } else if (rows) {
            records = v.outer * v.inner, length = v.channels, per_number = many;
        } else if (!many) {
            records = by_outer ? v.outer : 1, length = v.outer * v.channels * v.inner / records;
        } else if (v.inner < kShort && v.outer > 1) {
            records = v.outer, length = v.channels * v.inner, per_number = true, repeat = v.inner;
        } else {
            records = v.outer * v.channels, length = v.inner;
        }
        for (int64_t t = 0; t < (per_number ? times : 1); t++)
            for (int64_t s = 0; s < g.scales; s++) {
                const float value = g.scale[s];
                by_reciprocal = by_reciprocal && has_plain_reciprocal(value);
                scale.insert(scale.end(), repeat, value);
                reciprocal.insert(reciprocal.end(), repeat, 1.0f / value);
                zero.insert(zero.end(), repeat, g.zero ? g.zero[s] : 0.0f);
            }
        if (g.stochastic) {
            numbers.resize(rows ? times * v.channels : kRun);
            for (int64_t i = 0; i < static_cast<int64_t>(numbers.size()); i++) {
                const int64_t number = rows ? i % v.channels * v.inner + i / v.channels : i;
                numbers[i] = static_cast<uint32_t>(number) * kGolden;
            }
        }
        quantize = run_quantizer(per_number, by_reciprocal, g.offset, g.stochastic);
    }

    // The run that begins at number i of a record.
    Run at(int64_t record, int64_t i) const {
        const int64_t table = per_number ? (tiled ? 0 : i) : grid.scales == 1 ? 0 : record % view.channels;
        int64_t number = record * length + i;
        if (rows && tiled) number = record * length + i / view.channels;
        if (rows && !tiled) number = record / view.inner * view.channels * view.inner + record % view.inner;
        return {scale.data() + table,
                reciprocal.data() + table,
                zero.data() + table,
                grid.low,
                grid.high,
                static_cast<uint32_t>(number) * kGolden + grid.key0,
                grid.key1,
                numbers.data() + (rows && !tiled ? i : 0)};
    }
};

// Visit the tensor in runs: work(Plan, Run, record, first number in the record, count). `by_outer` makes a record of
// each index of `outer` where one scale serves all.
template <class Work>
void visit(View view, const Grid& grid, bool by_outer, const Work& work) {
    if (view.outer * view.channels * view.inner == 0) return;
    const Plan plan(view, grid, by_outer);
    const int64_t runs = ceil_div(plan.length, plan.run);                                 // of a record
    const int64_t batch = std::max<int64_t>(1, kTask / std::min(plan.run, plan.length));  // runs of one task
    const int64_t total = plan.records * runs;
#pragma omp parallel for schedule(static) if (total * plan.run > kAlone)
    for (int64_t task = 0; task < ceil_div(total, batch); task++) {
        const int64_t last = std::min((task + 1) * batch, total);
        for (int64_t part = task * batch; part < last; part++) {
            const int64_t record = part / runs, i = part % runs * plan.run;
            work(plan, plan.at(record, i), record, i, std::min(plan.run, plan.length - i));
        }
    }
}

}  // namespace
}  // namespace lowbit
