const SLOT = 1;
const WEIGHT = 2;
const BATCH_PRIORITY = 3;

/** See native/moe/plan_dispatch.h for the definition; this is the same function. */
export function planDispatchReference(
  indices: Int32Array,
  tokens: number,
  k: number,
  experts: number,
  globalExperts: number,
  expertMap: Int32Array | null,
  capacity: number,
  drop: number,
  weights: Float32Array | null,
  order: Int32Array,
  offsets: Int32Array,
  inverse: Int32Array,
  dropped: Int32Array | null,
  counts: Int32Array,
): number {
  const routesOf: number[][] = Array.from({ length: experts }, () => []);
  for (let i = 0; i < tokens * k; i++) {
    const id = indices[i];
    if (id < -1 || id >= globalExperts) return i + 1;
    const expert = id < 0 || expertMap === null ? id : expertMap[id];
    if (expert >= 0) routesOf[expert].push(i);
  }
  const weight = (i: number) => {
    const w = (weights as Float32Array)[i];
    return Number.isNaN(w) ? -Infinity : w;
  };
  const priority = (t: number) =>
    Array.from({ length: k }, (_, j) => weight(t * k + j)).reduce((a, b) => Math.max(a, b), -Infinity);
  const descending = (a: number, b: number) => (a === b ? 0 : b > a ? 1 : -1);
  const slot = (i: number) => i % k;
  const token = (i: number) => Math.floor(i / k);
  const before = (a: number, b: number) => {
    let difference = 0;
    if (drop === WEIGHT) difference = descending(weight(a), weight(b));
    if (drop === SLOT || drop === BATCH_PRIORITY) difference = slot(a) - slot(b);
    if (drop === BATCH_PRIORITY) difference ||= descending(priority(token(a)), priority(token(b)));
    return difference || a - b;
  };

  inverse.fill(-1);
  let place = 0;
  const lost: number[] = [];
  for (let e = 0; e < experts; e++) {
    offsets[e] = place;
    let kept = routesOf[e];
    if (capacity >= 0 && kept.length > capacity) {
      const ranked = kept.slice().sort(before);
      lost.push(...ranked.slice(capacity));
      kept = ranked.slice(0, capacity).sort((a, b) => a - b);
    }
    for (const route of kept) {
      inverse[route] = place;
      order[place++] = route;
    }
  }
  offsets[experts] = place;
  lost.sort((a, b) => a - b);
  dropped?.set(lost);
  counts[0] = lost.length;
  counts[1] = offsets[experts];
  return 0;
}
