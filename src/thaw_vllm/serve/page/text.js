// Numbers as people read them; a number and its unit stay on one line.

const NBSP = "\u00a0";

export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)}${NBSP}ms`;
  if (value < 9.95) return `${value.toFixed(1)}${NBSP}s`;
  if (value < 100) return `${Math.round(value)}${NBSP}s`;
  if (value < 5400) return `${Math.round(value / 60)}${NBSP}min`;
  if (value < 129600) return `${Math.round(value / 3600)}${NBSP}h`;
  return `${Math.round(value / 86400)}${NBSP}days`;
}

// Decimal, as `thaw info` has them.
export function bytes(value) {
  let left = value;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (left < 999.5) return `${left < 9.95 && unit !== "B" ? left.toFixed(1) : Math.round(left)}${NBSP}${unit}`;
    left /= 1000;
  }
  return `${left.toFixed(left < 9.95 ? 2 : 1)}${NBSP}TB`;
}

export function count(value) {
  if (value < 10000) return String(Math.round(value));
  if (value < 999500) return `${Math.round(value / 1000)}${NBSP}k`;
  if (value < 9.95e6) return `${(value / 1e6).toFixed(1)}${NBSP}M`;
  return `${Math.round(value / 1e6)}${NBSP}M`;
}

export function rate(value) {
  return value < 9.95 && value > 0 ? value.toFixed(1) : count(value);
}

export function percent(value) {
  return `${(value * 100).toFixed(value > 0 && value < 0.0995 ? 1 : 0)}${NBSP}%`;
}

export function clock(time) {
  return new Date(time * 1000).toLocaleTimeString("en-GB");
}

export function plural(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}
