// A whole model: embedding, backbone, head. Language model (tied or not) or classifier (last or
// mean pooling).
#pragma once

#include "model/backbone.h"

namespace coil {

struct Model {
  Config config;
  Tensor embedding;  // (v, d)
  Tensor labels;     // (labels, d), with config.condition: added to every step's embedding
  Backbone backbone;
  Tensor lm_head;     // (v, d); empty where tied or a classifier
  Tensor score;       // (classes, d); classifier only
  Tensor score_bias;  // (classes)

  const Tensor& output() const { return config.tie ? embedding : lm_head; }  // lm only
};

// Every tensor, allocated or not, under its Hugging Face name: backbone.embeddings.weight,
// backbone.label_embeddings.weight (condition; ours),
// backbone.layers.N.…, backbone.norm_f.weight, lm_head.weight (untied), score.weight, score.bias.
std::vector<Param> declare(Model& model);

Model make_model(Backend& backend, const Config& config, uint64_t seed);  // initialised, f32
Model zeros_like(Backend& backend, const Model& model);                   // gradients, moments; f32
int64_t parameters(const Config& config);

// A model folder: config.json, model.safetensors (or shards with model.safetensors.index.json),
// labels.txt. matrices: bf16 keeps matrices in bf16. Checks names, shapes and that every value is
// finite.
Model load_model(Backend& backend, const std::string& folder, DType matrices = DType::f32);
void save_model(Backend& backend, const Model& model, const std::string& folder,
                int64_t shard_bytes = 0);
// For `train --from`: every tensor of the same name and shape; a head of another kind or class list
// starts anew. Returns the names taken.
std::vector<std::string> load_matching(Backend& backend, Model& model, const std::string& folder);

// A model of the same shape with matrices in `matrices`, for training in bf16 beside f32 weights;
// and its values anew, after a step.
Model converted(Backend& backend, const Model& model, DType matrices);
void copy_values(Backend& backend, const Model& from, Model& to);

// ids (t) i32, in host or device memory; with config.condition, vocab times the number of the
// sequence's label is added to each (ops.h: Embed) → hidden (t,d) after the final norm, of
// activation type. Not `whole`: as Backbone::forward.
Tensor hidden(Backend& backend, const Model& model, View ids, const Rows& rows, State* state,
              Saved* saved = nullptr, bool whole = true);
// (t, config.predicted()) f32
Tensor lm_logits(Backend& backend, const Model& model, View hidden);
// (m / strands, classes) f32 of the m sequences that end in rows; pooled: their (m, d). Of two
// strands, one behind the other, the answer is shared: the mean.
Tensor class_logits(Backend& backend, const Model& model, View hidden, const Rows& rows,
                    State* state, Tensor* pooled = nullptr, int strands = 1);
// Rows strand, strand + strands, … of pooled.
View strand_of(const Tensor& pooled, int strand, int strands);

// The softmaxes over the logits of a language model: a target takes part in the one it stands in.
// Of DNA one over all; of audio one over the codes of mu-law, or one over the coarse codes of 16
// bits and one over the fine ones.
struct Softmax {
  int64_t begin, count;  // columns
  bool operator==(const Softmax&) const = default;
};
std::vector<Softmax> softmaxes(const Config& config);
// `targets` less the begin of a softmax where they stand in it, else -1.
std::vector<int32_t> targets_in(const Softmax& softmax, View targets);

// lm_logits() of hidden(), where pieces of one step are one op if the backend has it; of networks
// of S4D only with their tables (model/step_tables.h). `read`: ids count from its begin on;
// `drawn`: the logits are over its columns alone. So an id that is drawn from one softmax is read
// by the next step as it is, wherever it lies. Of a conditional model the label is that of the
// tables, and ids are without; with guidance ids from read.count on are those without label.
struct StepTables;
Tensor step_logits(Backend& backend, const Model& model, const StepTables& tables, View ids,
                   const Rows& rows, State* state, Softmax read, Softmax drawn);
Tensor step_logits(Backend& backend, const Model& model, const StepTables& tables, View ids,
                   const Rows& rows, State* state);

}  // namespace coil
