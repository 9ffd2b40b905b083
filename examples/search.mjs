// Searches an index that `tcq export --format=parquet` wrote: node search.mjs items.parquet feature.json [k]
// npm install hyparquet hyparquet-compressors
import { readFileSync } from "node:fs";
import { asyncBufferFromFile, parquetReadObjects } from "hyparquet";
import { compressors } from "hyparquet-compressors";

const [file, featureFile, k = 10] = process.argv.slice(2);
const rule = JSON.parse(readFileSync(`${file}.json`, "utf8"));
const items = await parquetReadObjects({ file: await asyncBufferFromFile(file), compressors });

const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const unit = (a) => a.map((x) => x / Math.sqrt(dot(a, a)));

let feature = JSON.parse(readFileSync(featureFile, "utf8"));
if (rule.score === "cosine" || rule.normalize === "whole") feature = unit(feature);
const table = rule.codebooks.map((words, m) => {
  const d = words[0].length;
  const part = feature.slice(m * d, (m + 1) * d);
  const q = rule.normalize === "subvectors" ? unit(part) : part;
  return words.map((word) => {
    if (rule.score !== "l2") return dot(q, word);
    const difference = q.map((x, i) => x - word[i]);
    const distance = dot(difference, difference);
    return rule.squared ? -distance : -Math.sqrt(distance);
  });
});

const score = (item) => table.reduce((sum, row, m) => sum + row[item[`code${m}`]], 0) / (item.norm ?? 1);
const hits = items.map((item) => ({ id: Number(item.id), path: item.path, score: score(item) }));
hits.sort((a, b) => b.score - a.score || a.id - b.id);
console.log(JSON.stringify(hits.slice(0, Number(k))));
