//! How much a guest may ask: so many answers at once, and so many a second.

use std::time::Duration;

/// A bucket of tokens: one an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    size: u32,
    per_second: u32,
    /// Thousandths of tokens.
    level: u64,
    at: Duration,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(size: u32, per_second: u32, now: Duration) -> Self {
        Self {
            size,
            per_second,
            level: u64::from(size) * 1000,
            at: now,
        }
    }

    /// Takes a token, if there is one.
    pub(crate) fn take(&mut self, now: Duration) -> bool {
        let passed = u64::try_from(now.saturating_sub(self.at).as_millis()).unwrap_or(u64::MAX);
        let more = passed.saturating_mul(u64::from(self.per_second));
        if more > 0 {
            self.level = self.level.saturating_add(more).min(u64::from(self.size) * 1000);
            self.at = now;
        }
        let taken = self.level >= 1000;
        if taken {
            self.level -= 1000;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_at_once_and_so_many_a_second() {
        let mut bucket = Bucket::new(3, 2, Duration::ZERO);
        let taken = |bucket: &mut Bucket, at| (0..10).filter(|_| bucket.take(Duration::from_millis(at))).count();
        assert_eq!(taken(&mut bucket, 0), 3);
        assert_eq!(taken(&mut bucket, 499), 0);
        assert_eq!(taken(&mut bucket, 1000), 2);
        assert_eq!(taken(&mut bucket, 100_000), 3);
    }
}
