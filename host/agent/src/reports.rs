//! What the host tells: numbered, and kept until the controller acknowledges that it is committed.
//!
//! What does not fit a frame gets no number: a number that is never sent would be a gap, and the controller ends a session with one.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use model::{Report, VmId, id::Sequence, order::Happening, order::VmObserved};
use tokio::sync::Notify;
use wire::{Up, session::FRAME_BYTES_MAX};

/// Reports kept at once. When there are more the oldest go, and count as acknowledged: the next session begins behind them, and with an
/// inventory in any case, which tells all that they told.
const KEPT_MAX: usize = 10_000;
/// Bytes of them, likewise.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// A part of an inventory ends with the VM that fills this many bytes.
const PART_BYTES: usize = 1 << 20;

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
    /// As they go over the wire.
    kept: VecDeque<(Sequence, Bytes)>,
    kept_bytes: usize,
}

/// All VMs that are known here, as reports: one, or as many as fit a frame each. `vms` are in the order of their ids.
pub(crate) fn inventory(vms: Vec<VmObserved>) -> Vec<Report> {
    let mut parts: Vec<Vec<VmObserved>> = vec![vec![]];
    let mut bytes = 0;
    for vm in vms.into_iter().map(briefly) {
        if bytes > PART_BYTES {
            parts.push(vec![]);
            bytes = 0;
        }
        bytes += serde_json::to_vec(&vm).map_or(0, |json| json.len());
        if let Some(part) = parts.last_mut() {
            part.push(vm);
        }
    }
    let count = parts.len();
    let mut after: Option<VmId> = None;
    let mut told = Vec::with_capacity(count);
    for (n, vms) in parts.into_iter().enumerate() {
        let up_to = vms.last().map(|vm| vm.vm).filter(|_| n + 1 < count);
        told.push(match count {
            1 => Report::Inventory { vms },
            _ => Report::InventoryPart { vms, after, up_to },
        });
        after = up_to;
    }
    told
}

/// Without the receipt of a move that is over: its own report told it, and a tombstone is told with each inventory from then on.
fn briefly(mut vm: VmObserved) -> VmObserved {
    if let Happening::TornDown { receipt, .. } = &mut vm.what {
        **receipt = model::Receipt::default();
    }
    vm
}

impl Reports {
    /// Adds a report, unless it is too long for a frame.
    pub(crate) fn push(&self, report: Report) {
        let mut inner = self.lock();
        let sequence = Sequence(inner.last + 1);
        let frame = match wire::encode(&Up::Report { sequence, report }, FRAME_BYTES_MAX) {
            Ok(frame) => frame,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                return tracing::error!(error, "a report cannot be told; the next inventory tells how the VM is");
            }
        };
        inner.last = sequence.0;
        inner.kept_bytes += frame.len();
        inner.kept.push_back((sequence, frame));
        while inner.kept.len() > KEPT_MAX || inner.kept_bytes > KEPT_BYTES_MAX {
            // A gap that is not declared would end every session that meets it.
            let Some(dropped) = inner.pop() else { break };
            inner.acknowledged = inner.acknowledged.max(dropped.0);
        }
        drop(inner);
        self.more.notify_one();
    }

    /// Forgets reports up to this one.
    pub(crate) fn acknowledge(&self, up_to: Sequence) {
        let mut inner = self.lock();
        inner.acknowledged = inner.acknowledged.max(up_to.0);
        while inner.kept.front().is_some_and(|(sequence, _)| *sequence <= up_to) {
            inner.pop();
        }
    }

    /// The last that was acknowledged.
    pub(crate) fn acknowledged(&self) -> Sequence {
        Sequence(self.lock().acknowledged)
    }

    /// Those after `sent`, at most `limit`, oldest first, as frames; waits until there is one.
    pub(crate) async fn after(&self, sent: Sequence, limit: usize) -> Vec<(Sequence, Bytes)> {
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

impl Inner {
    /// Takes the oldest out.
    fn pop(&mut self) -> Option<Sequence> {
        let (sequence, frame) = self.kept.pop_front()?;
        self.kept_bytes -= frame.len();
        Some(sequence)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use model::{Generation, Receipt, Revision, Round};
    use uuid::Uuid;

    use super::*;

    fn observed(n: u128, what: Happening) -> VmObserved {
        VmObserved {
            vm: VmId(Uuid::from_u128(n)),
            generation: Generation(1),
            revision: Revision(1),
            what,
        }
    }

    fn long(bytes: usize) -> Report {
        let reason = "x".repeat(bytes);
        Report::Inventory {
            vms: vec![observed(1, Happening::Unknown { reason })],
        }
    }

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

    #[tokio::test]
    async fn a_report_that_fits_no_frame_leaves_no_gap() {
        let reports = Reports::default();
        reports.push(report());
        reports.push(long(FRAME_BYTES_MAX));
        reports.push(report());
        let kept = reports.after(Sequence(0), 10).await;
        assert_eq!(kept.iter().map(|(s, _)| s.0).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(reports.acknowledged(), Sequence(0));
    }

    #[tokio::test]
    async fn their_bytes_are_bounded_too() {
        let reports = Reports::default();
        for _ in 0..100 {
            reports.push(long(1 << 20));
        }
        let kept = reports.after(Sequence(0), usize::MAX).await;
        assert!(kept.iter().map(|(_, frame)| frame.len()).sum::<usize>() <= KEPT_BYTES_MAX);
        assert_eq!(reports.acknowledged().0 + 1, kept[0].0.0);
        reports.acknowledge(Sequence(100));
        assert_eq!(reports.lock().kept_bytes, 0);
    }

    #[tokio::test]
    async fn an_inventory_of_any_size_goes_in_frames_that_cover_all_ids_once() {
        let unknown = |n| {
            let reason = "x".repeat(300);
            observed(n, Happening::Unknown { reason })
        };
        let vms: Vec<VmObserved> = (1..=12_000).map(unknown).collect();
        let whole = serde_json::to_vec(&Report::Inventory { vms: vms.clone() }).unwrap();
        assert!(whole.len() > FRAME_BYTES_MAX);
        let parts = inventory(vms);
        assert!(parts.len() > 1);
        let (mut next, mut told) = (None, 0);
        for (n, part) in parts.iter().enumerate() {
            assert!(serde_json::to_vec(part).unwrap().len() < FRAME_BYTES_MAX / 2);
            let Report::InventoryPart { vms, after, up_to } = part else {
                unreachable!("{part:?}")
            };
            assert_eq!(*after, next, "no id is between two parts");
            assert_eq!(up_to.is_none(), n + 1 == parts.len());
            assert!(vms.iter().all(|vm| after.is_none_or(|after| vm.vm > after)));
            assert!(vms.iter().all(|vm| up_to.is_none_or(|up_to| vm.vm <= up_to)));
            (next, told) = (*up_to, told + vms.len());
        }
        assert_eq!(told, 12_000);
        let reports = Reports::default();
        parts.into_iter().for_each(|part| reports.push(part));
        assert_eq!(
            reports.after(Sequence(0), usize::MAX).await.last().unwrap().0.0,
            reports.lock().last
        );
        // A small one is as ever.
        assert!(matches!(inventory(vec![unknown(1)])[..], [Report::Inventory { .. }]));
        assert!(matches!(inventory(vec![])[..], [Report::Inventory { .. }]));
    }

    #[test]
    fn a_tombstone_is_told_without_its_receipt() {
        let rounds = vec![Round::default(); 200];
        let receipt = Box::new(Receipt {
            rounds,
            ..Receipt::default()
        });
        let stopped_at_ms = Some(7);
        let told = inventory(vec![observed(1, Happening::TornDown { receipt, stopped_at_ms })]);
        let receipt = Box::default();
        let vms = vec![observed(1, Happening::TornDown { receipt, stopped_at_ms })];
        assert_eq!(told, [Report::Inventory { vms }]);
    }
}
