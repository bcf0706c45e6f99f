// Prints the vectors of texts by an exported student in a local folder, as JSON: node vectors.mjs FOLDER DTYPE < texts.json
// DTYPE is fp32 (onnx/model.onnx) or q8 (onnx/model_quantized.onnx). Nothing is fetched.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModel, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useFSCache = false;
env.localModelPath = dirname(folder);
const name = basename(folder);
const texts = JSON.parse(readFileSync(0, "utf8"));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype });
const inputs = await tokenizer(texts, { padding: true, truncation: true });
const { sentence_embedding: vectors } = await model(inputs);
process.stdout.write(JSON.stringify({ dims: vectors.dims, values: Array.from(vectors.data), ids: inputs.input_ids.tolist().map((row) => row.map(Number)) }));
