//! Median, worst, ratios of pairs, and how sure the median ratio is.

/// Resamples for the interval.
const RESAMPLES: usize = 10_000;

/// Median; the mean of the middle two when the number is even. NaN when empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The largest value (lower is better everywhere here). NaN when empty.
pub fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

/// Median of the pairwise ratios and the bootstrap's 95 % interval of it
/// (Efron 1979, percentile method). The generator is seeded: the same samples
/// give the same interval.
pub fn ratio(ours: &[f64], theirs: &[f64]) -> Ratio {
    let ratios: Vec<f64> = ours
        .iter()
        .zip(theirs)
        .map(|(a, b)| a / b)
        .filter(|ratio| ratio.is_finite())
        .collect();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let sample: Vec<f64> = ratios
                .iter()
                .map(|_| ratios[next_index(&mut state, ratios.len())])
                .collect();
            median(&sample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Ratio {
        median: median(&ratios),
        low: medians[RESAMPLES * 25 / 1000],
        high: medians[RESAMPLES * 975 / 1000],
        pairs: ratios.len(),
    }
}

/// A median ratio with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// Median of the pairwise ratios.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end: what must meet a limit.
    pub high: f64,
    /// Pairs that entered.
    pub pairs: usize,
}

/// xorshift64*: enough to draw with replacement.
fn next_index(state: &mut u64, length: usize) -> usize {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    let random = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33;
    (random % length.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_and_the_worst_the_largest() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(worst(&[1.0, 9.0, 2.0]), 9.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_ratio_is_of_pairs_and_its_interval_holds_it() {
        let theirs: Vec<f64> = (1..=20).map(f64::from).collect();
        let ours: Vec<f64> = theirs.iter().map(|value| value * 1.1).collect();
        let same = ratio(&ours, &theirs);
        assert!(
            (same.median - 1.1).abs() < 1e-9 && (same.high - same.low) < 1e-9,
            "{same:?}"
        );
        let noisy: Vec<f64> = theirs
            .iter()
            .enumerate()
            .map(|(i, v)| v * (1.0 + (i % 5) as f64 / 10.0))
            .collect();
        let noisy = ratio(&noisy, &theirs);
        assert!(
            noisy.low <= noisy.median && noisy.median <= noisy.high && noisy.low < noisy.high,
            "{noisy:?}"
        );
        assert_eq!(noisy.pairs, 20);
    }

    #[test]
    fn no_pairs_give_no_number() {
        assert!(ratio(&[], &[]).median.is_nan());
    }
}
