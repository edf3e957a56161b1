//! What the host tells: numbered, and kept until the controller acknowledges that it is committed.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use model::{Report, id::Sequence};
use tokio::sync::Notify;

/// Reports kept at once. When there are more the oldest go, and count as acknowledged: the next session begins behind them, and with an
/// inventory in any case, which tells all that they told.
const KEPT_MAX: usize = 10_000;

/// The reports that are not acknowledged yet.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    inner: Mutex<Inner>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Number of the last report that was made.
    last: u64,
    acknowledged: u64,
    kept: VecDeque<(Sequence, Report)>,
}

impl Reports {
    /// Adds a report.
    pub(crate) fn push(&self, report: Report) {
        let mut inner = self.lock();
        inner.last += 1;
        let sequence = Sequence(inner.last);
        if inner.kept.len() == KEPT_MAX {
            // A gap that is not declared would end every session that meets it.
            if let Some((dropped, _)) = inner.kept.pop_front() {
                inner.acknowledged = inner.acknowledged.max(dropped.0);
            }
        }
        inner.kept.push_back((sequence, report));
        drop(inner);
        self.more.notify_one();
    }

    /// Forgets reports up to this one.
    pub(crate) fn acknowledge(&self, up_to: Sequence) {
        let mut inner = self.lock();
        inner.acknowledged = inner.acknowledged.max(up_to.0);
        while inner.kept.front().is_some_and(|(sequence, _)| *sequence <= up_to) {
            inner.kept.pop_front();
        }
    }

    /// The last that was acknowledged.
    pub(crate) fn acknowledged(&self) -> Sequence {
        Sequence(self.lock().acknowledged)
    }

    /// Those after `sent`, at most `limit`, oldest first; waits until there is one.
    pub(crate) async fn after(&self, sent: Sequence, limit: usize) -> Vec<(Sequence, Report)> {
        loop {
            let more = self.more.notified();
            let next: Vec<_> = {
                let inner = self.lock();
                inner
                    .kept
                    .iter()
                    .filter(|(sequence, _)| *sequence > sent)
                    .take(limit)
                    .cloned()
                    .collect()
            };
            if !next.is_empty() {
                return next;
            }
            more.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use model::order::VmObserved;

    use super::*;

    fn report() -> Report {
        Report::Inventory {
            vms: Vec::<VmObserved>::new(),
        }
    }

    #[tokio::test]
    async fn a_report_is_given_again_until_it_is_acknowledged() {
        let reports = Reports::default();
        reports.push(report());
        reports.push(report());
        assert_eq!(reports.after(Sequence(0), 10).await.len(), 2);
        reports.acknowledge(Sequence(1));
        let left = reports.after(Sequence(0), 10).await;
        assert_eq!(left.iter().map(|(s, _)| s.0).collect::<Vec<_>>(), [2]);
        assert_eq!(reports.acknowledged(), Sequence(1));
    }

    #[tokio::test]
    async fn they_are_bounded_and_the_newest_stay() {
        let reports = Reports::default();
        for _ in 0..KEPT_MAX + 5 {
            reports.push(report());
        }
        let kept = reports.after(Sequence(0), usize::MAX).await;
        assert_eq!((kept.len(), kept[0].0), (KEPT_MAX, Sequence(6)));
        assert_eq!(
            reports.acknowledged(),
            Sequence(5),
            "the next session begins behind the gap"
        );
    }
}
