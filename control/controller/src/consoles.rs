//! Serial consoles: a person's bytes to a guest and back, over a connection that the guest's agent opens for it.
//!
//! ```text
//!   person ── duplex pipe ── controller ── Down::OpenConsole {id, ticket} ──▶ agent
//!                                 ◀── POST /agent/v1/console/{id}, ticket ──── agent
//!                              request body: what the guest prints; response body: what the person types
//! ```

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use model::{HostId, Refusal, refusal::Code};
use tokio::{io::DuplexStream, sync::oneshot};
use uuid::Uuid;
use wire::{Ticket, session::CONSOLE_TICKET_VALID};

/// Bytes on their way in one direction of a console.
const PIPE_BYTES: usize = 64 << 10;

/// Consoles that wait for their agent at a time.
const WAITING_MAX: usize = 256;

/// Consoles of a host at a time. Each is a stream of its agent's one connection, which has room for blobs and renewals besides.
const OF_A_HOST_MAX: usize = 32;

/// The consoles that wait for their agents, and how many each host has.
#[derive(Debug, Default)]
pub(crate) struct Consoles {
    waiting: Mutex<BTreeMap<Uuid, Waiting>>,
    places: Places,
}

/// Taken places, by host.
type Places = Arc<Mutex<BTreeMap<HostId, usize>>>;

/// A console's place among those of its host; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    host: HostId,
    of: Places,
}

impl Place {
    fn take(of: &Places, host: HostId) -> Option<Self> {
        let mut places = lock(of);
        let taken = places.entry(host).or_default();
        if *taken >= OF_A_HOST_MAX {
            return None;
        }
        *taken += 1;
        Some(Self { host, of: of.clone() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = lock(&self.of);
        if let Some(taken) = places.get_mut(&self.host) {
            *taken -= 1;
            if *taken == 0 {
                places.remove(&self.host);
            }
        }
    }
}

/// What is behind it is whole after each statement, also after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent's end of a console.
#[derive(Debug)]
pub(crate) struct AgentsEnd {
    pub(crate) pipe: DuplexStream,
    /// Held as long as a byte may still go either way.
    pub(crate) place: Place,
}

#[derive(Debug)]
struct Waiting {
    host: HostId,
    ticket: Ticket,
    until: Instant,
    agents_end: AgentsEnd,
    opened: oneshot::Sender<Result<(), Refusal>>,
}

/// A console that was asked for.
pub(crate) struct Asked {
    pub(crate) id: Uuid,
    pub(crate) ticket: Ticket,
    pub(crate) persons_end: DuplexStream,
    pub(crate) opened: oneshot::Receiver<Result<(), Refusal>>,
}

impl Consoles {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<Uuid, Waiting>> {
        lock(&self.waiting)
    }

    /// Notes that a console is about to be opened by this host.
    pub(crate) fn ask(&self, host: HostId) -> Result<Asked, Refusal> {
        let secret: [u8; 32] = identity::random().map_err(|error| Refusal::new(Code::Overloaded, error.to_string()))?;
        let ticket = Ticket::new(URL_SAFE_NO_PAD.encode(secret));
        let id = Uuid::now_v7();
        let (persons_end, pipe) = tokio::io::duplex(PIPE_BYTES);
        let (tell, opened) = oneshot::channel();
        let now = Instant::now();
        let mut waiting = self.waiting();
        waiting.retain(|_, console| console.until > now && !console.opened.is_closed());
        if waiting.len() >= WAITING_MAX {
            let message = "too many consoles wait to be opened";
            return Err(Refusal::new(Code::Overloaded, message).hint("try again in a moment"));
        }
        let place = Place::take(&self.places, host).ok_or_else(|| {
            let message = format!("the host of this VM has {OF_A_HOST_MAX} consoles open, the most that it may");
            Refusal::new(Code::Overloaded, message).hint("close one of them, then try again")
        })?;
        let console = Waiting {
            host,
            ticket: ticket.clone(),
            until: now + CONSOLE_TICKET_VALID,
            agents_end: AgentsEnd { pipe, place },
            opened: tell,
        };
        waiting.insert(id, console);
        Ok(Asked {
            id,
            ticket,
            persons_end,
            opened,
        })
    }

    /// The agent's end, for the one who was asked and shows the ticket; once, in time. `None` does not say what was wrong.
    pub(crate) fn open(&self, id: Uuid, host: HostId, ticket: &str, now: Instant) -> Option<AgentsEnd> {
        let console = self.take(id, host)?;
        // Taken out first: a wrong ticket is a used one.
        let right = identity::same_secret(console.ticket.expose().as_bytes(), ticket.as_bytes());
        if !right || now >= console.until {
            return None;
        }
        console.opened.send(Ok(())).ok()?;
        Some(console.agents_end)
    }

    /// The host cannot open it.
    pub(crate) fn refuse(&self, id: Uuid, host: HostId, reason: Refusal) {
        if let Some(console) = self.take(id, host) {
            // The person may have gone.
            let _ = console.opened.send(Err(reason));
        }
    }

    /// The host's agent is gone: consoles that wait for it will not be opened.
    pub(crate) fn gone(&self, host: HostId) {
        let mut waiting = self.waiting();
        let ids: Vec<Uuid> = waiting
            .iter()
            .filter(|(_, console)| console.host == host)
            .map(|(id, _)| *id)
            .collect();
        // Dropped, which is how the persons notice.
        ids.iter().for_each(|id| drop(waiting.remove(id)));
    }

    fn take(&self, id: Uuid, host: HostId) -> Option<Waiting> {
        let mut waiting = self.waiting();
        // Another host's guess must not use it up.
        waiting.get(&id).filter(|console| console.host == host)?;
        waiting.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_opens_once_in_time_for_the_host_that_was_asked() {
        let (host, other) = (HostId(Uuid::from_u128(1)), HostId(Uuid::from_u128(2)));
        let consoles = Consoles::default();
        let now = Instant::now();
        let asked = consoles.ask(host).unwrap();
        let ticket = asked.ticket.expose();
        assert!(consoles.open(asked.id, other, ticket, now).is_none());
        assert!(consoles.open(Uuid::nil(), host, ticket, now).is_none());
        assert!(consoles.open(asked.id, host, ticket, now).is_some());
        assert!(consoles.open(asked.id, host, ticket, now).is_none());

        let asked = consoles.ask(host).unwrap();
        assert!(consoles.open(asked.id, host, "guess", now).is_none());
        assert!(consoles.open(asked.id, host, asked.ticket.expose(), now).is_none());

        let asked = consoles.ask(host).unwrap();
        let late = Instant::now() + CONSOLE_TICKET_VALID;
        assert!(consoles.open(asked.id, host, asked.ticket.expose(), late).is_none());
    }

    #[test]
    fn a_host_has_no_more_consoles_than_its_connection_has_room_for() {
        let (host, other) = (HostId(Uuid::from_u128(1)), HostId(Uuid::from_u128(2)));
        let consoles = Consoles::default();
        let now = Instant::now();
        let open = |host| {
            let asked = consoles.ask(host)?;
            Ok::<_, Refusal>(consoles.open(asked.id, host, asked.ticket.expose(), now).unwrap())
        };
        let mut all: Vec<AgentsEnd> = (0..OF_A_HOST_MAX).map(|_| open(host).unwrap()).collect();
        assert_eq!(open(host).unwrap_err().code, Code::Overloaded);
        assert!(open(other).is_ok());
        all.pop();
        // One that waits counts too, until it is given up.
        let waiting = consoles.ask(host).unwrap();
        assert!(consoles.ask(host).is_err());
        consoles.refuse(waiting.id, host, Refusal::new(Code::WrongState, "the VM is off"));
        all.push(open(host).unwrap());
        drop(all);
        assert!(lock(&consoles.places).is_empty());
    }

    #[tokio::test]
    async fn a_hosts_refusal_reaches_the_person() {
        let host = HostId(Uuid::from_u128(1));
        let consoles = Consoles::default();
        let asked = consoles.ask(host).unwrap();
        let reason = Refusal::new(Code::WrongState, "the VM is off");
        consoles.refuse(asked.id, host, reason.clone());
        assert_eq!(asked.opened.await.unwrap(), Err(reason));
    }
}
