#include "pipelines/engine.h"

#include "pipelines/fit.h"
#include "pipelines/workers.h"

namespace coil {

void run_stream(Backend& backend, const Model& model, Source& source, const StreamOptions& options,
                const EngineHooks& hooks) {
  StreamOptions chosen = options;
  const bool chosen_here = chosen.batch <= 0;
  if (chosen_here)
    chosen.batch = fitting_batch(backend, model.config, model.embedding.view().dtype, chosen.note);
  Workers workers(backend);
  if (model.config.bidirectional)  // each worker may have a record of its own
    chosen.whole =
        longest_whole(backend, model.config, model.embedding.view().dtype) / workers.count();
  Stream stream(source, chosen, workers.count(), FrontEnd(model.config));
  State state(backend, model.config, stream.slots() + Parts::kSpare * workers.count());
  Parts parts(stream, chosen_here && chosen.whole == 0, chosen.note);
  std::vector<Stream::Batch> batches(workers.count());
  std::vector<std::vector<float>> numbers(batches.size());
  while (const int filled = stream.next(batches)) {
    workers.run(filled, [&](int i, Backend& own) {
      numbers[i] = parts.run(own, batches[i], i,
                             [&](Stream::Batch& part) { return hooks.compute(own, part, state); });
    });
    for (int b = 0; b < filled; b++) hooks.add(batches[b], numbers[b]);
    hooks.turn(stream);
  }
}

}  // namespace coil
