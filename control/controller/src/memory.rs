//! A store that forgets when the process ends: for the simulator and for tests of the loop.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use model::{
    AuditEntry, AuditId, Change, Epoch, Key, Operation, OperationId, ProjectId, Row,
    audit::AuditFilter,
    change::Answer,
    query::{Listing, Page},
};

use crate::storage::{Storage, Stored, Waited};

/// Rows in memory, of epoch 1.
#[derive(Debug, Default)]
pub struct Memory {
    rows: Mutex<BTreeMap<Key, Row>>,
}

impl Memory {
    fn rows(&self) -> MutexGuard<'_, BTreeMap<Key, Row>> {
        // A change is one call of the map: it is whole even after a panic elsewhere.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Memory {
    fn load(&self) -> Waited<'_, Stored> {
        Box::pin(async move {
            let rows = self.rows();
            // As the store on disk: an answer is read when it is asked for.
            let rows = rows.values().filter(|row| !matches!(row, Row::Answer(_)));
            let rows = rows.cloned().collect();
            Ok(Stored { epoch: Epoch(1), rows })
        })
    }

    fn recover(&self) -> Waited<'_, Stored> {
        self.load()
    }

    fn commit(&self, changes: Vec<Change>) -> Waited<'_, ()> {
        Box::pin(async move {
            let mut rows = self.rows();
            for change in changes {
                match change {
                    Change::Put(row) => drop(rows.insert(row.key(), row)),
                    Change::Delete(key) => drop(rows.remove(&key)),
                }
            }
            Ok(())
        })
    }

    fn answer(&self, project: ProjectId, key: String) -> Waited<'_, Option<Answer>> {
        Box::pin(async move {
            let rows = self.rows();
            Ok(match rows.get(&Key::Answer(project, key)) {
                Some(Row::Answer(answer)) => Some(answer.clone()),
                _ => None,
            })
        })
    }

    fn operation(&self, id: OperationId) -> Waited<'_, Option<Operation>> {
        Box::pin(async move {
            let rows = self.rows();
            Ok(match rows.get(&Key::Operation(id)) {
                Some(Row::Operation(operation)) => Some(operation.as_ref().clone()),
                _ => None,
            })
        })
    }

    fn operations(&self, project: Option<ProjectId>, page: Page) -> Waited<'_, Listing<Operation>> {
        Box::pin(async move {
            let rows = self.rows();
            let newest_first = rows.values().rev().filter_map(|row| match row {
                Row::Operation(operation) => Some(operation.as_ref()),
                _ => None,
            });
            let asked = newest_first
                .filter(|operation| project.is_none_or(|project| operation.project == project))
                .filter(|operation| page.after.is_none_or(|after| operation.id.0 < after));
            let items: Vec<Operation> = asked.take(page.limit).cloned().collect();
            let next = items.last().map(|last| last.id.0).filter(|_| items.len() == page.limit);
            Ok(Listing { items, next })
        })
    }

    fn audit(&self, filter: AuditFilter, page: Page) -> Waited<'_, Listing<AuditEntry>> {
        Box::pin(async move {
            let rows = self.rows();
            let meant = |entry: &&AuditEntry| {
                let AuditFilter {
                    project,
                    subject,
                    from,
                    until,
                } = &filter;
                project.is_none_or(|project| entry.project == Some(project))
                    && subject.as_ref().is_none_or(|subject| entry.subject == *subject)
                    && from.is_none_or(|from| entry.id >= AuditId::first_at(from))
                    && until.is_none_or(|until| entry.id < AuditId::first_at(until))
                    && page.after.is_none_or(|after| entry.id.0 < after)
            };
            let newest_first = rows.values().rev().filter_map(|row| match row {
                Row::Audit(entry) => Some(entry.as_ref()),
                _ => None,
            });
            let items: Vec<AuditEntry> = newest_first.filter(meant).take(page.limit).cloned().collect();
            let next = items.last().map(|last| last.id.0).filter(|_| items.len() == page.limit);
            Ok(Listing { items, next })
        })
    }
}
