//! Who may connect when many want to: connections that have not asked for anything yet make room, the oldest first, and no address
//! takes more than its share.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::task::AbortHandle;

/// The bounds of one port, and who is in.
#[derive(Debug)]
pub(crate) struct Admission {
    connections_max: usize,
    /// No address has more of them: whoever opens all that it can leaves others room.
    per_address_max: usize,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    next: u64,
    count: usize,
    addresses: HashMap<IpAddr, usize>,
    /// Those that have not made a request, oldest first, with what ends them.
    unproven: BTreeMap<u64, Option<AbortHandle>>,
}

/// A connection's place; dropped, it is free.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Arc<Admission>,
    number: u64,
    address: IpAddr,
}

impl Admission {
    pub(crate) fn new(connections_max: usize) -> Arc<Self> {
        Arc::new(Self {
            connections_max,
            per_address_max: connections_max.div_ceil(2),
            inside: Mutex::default(),
        })
    }

    /// A place for a connection from `address`. Where all are taken, the oldest connection that has not asked for anything ends for it;
    /// `None` when all have, or the address has its share.
    pub(crate) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut inside = self.lock();
        let own = inside.addresses.get(&address).copied().unwrap_or_default();
        if own >= self.per_address_max {
            return None;
        }
        if inside.count >= self.connections_max {
            let (&oldest, _) = inside.unproven.iter().find(|(_, end)| end.is_some())?;
            let end = inside.unproven.remove(&oldest).flatten()?;
            end.abort();
        }
        let number = inside.next;
        inside.next += 1;
        inside.count += 1;
        *inside.addresses.entry(address).or_default() += 1;
        inside.unproven.insert(number, None);
        Some(Place {
            admission: Arc::clone(self),
            number,
            address,
        })
    }

    /// What ends the connection that has this place, as long as it has not asked for anything.
    pub(crate) fn ends_by(&self, number: u64, end: AbortHandle) {
        if let Some(unproven) = self.lock().unproven.get_mut(&number) {
            *unproven = Some(end);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inside> {
        // Plain numbers: whole at every moment.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// It has made a request: it stays as long as it likes.
    pub(crate) fn proven(&self) {
        self.admission.lock().unproven.remove(&self.number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.admission.lock();
        inside.count -= 1;
        inside.unproven.remove(&self.number);
        if let Some(own) = inside.addresses.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                inside.addresses.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    /// A connection that says nothing until it is ended.
    fn silent(admission: &Arc<Admission>, from: u8) -> Option<tokio::task::JoinHandle<()>> {
        let place = admission.admit(address(from))?;
        let number = place.number();
        let task = tokio::spawn(async move {
            let _place = place;
            std::future::pending::<()>().await;
        });
        admission.ends_by(number, task.abort_handle());
        Some(task)
    }

    #[tokio::test]
    async fn the_oldest_that_has_asked_for_nothing_makes_room() {
        let admission = Admission::new(4);
        let proven = admission.admit(address(1)).unwrap();
        proven.proven();
        let silent: Vec<_> = (2..5).map(|n| silent(&admission, n).unwrap()).collect();
        let late = admission.admit(address(9)).unwrap();
        let [oldest, second, third] = silent.try_into().unwrap();
        assert!(oldest.await.unwrap_err().is_cancelled());
        assert!(!second.is_finished() && !third.is_finished());
        assert_eq!(admission.lock().count, 4);
        late.proven();
    }

    #[tokio::test]
    async fn one_address_cannot_shut_others_out() {
        let admission = Admission::new(4);
        let greedy: Vec<_> = (0..2).map(|_| admission.admit(address(1)).unwrap()).collect();
        greedy.iter().for_each(Place::proven);
        assert!(admission.admit(address(1)).is_none());
        let others: Vec<_> = (2..4).map(|n| admission.admit(address(n)).unwrap()).collect();
        others.iter().for_each(Place::proven);
        // All have asked for something: nobody is ended.
        assert!(admission.admit(address(9)).is_none());
        drop(greedy);
        assert!(admission.admit(address(1)).is_some());
    }
}
