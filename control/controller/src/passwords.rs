//! Passwords: hashed and checked with argon2id beside the loop, few at a time; and how often one may try.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use argon2::{
    Algorithm, Argon2, Params, PasswordHash as Phc, PasswordHasher as _, PasswordVerifier as _, Version,
    password_hash::SaltString,
};
use model::{Code, Name, Refusal, Secret, access::PasswordHash};
use tokio::sync::Semaphore;
use uuid::Uuid;

/// Shortest password, characters (NIST SP 800-63B, 3.1.1.2, with room above its least).
const LENGTH_MIN: usize = 10;

/// Longest password, bytes: beyond that only time is lost.
const BYTES_MAX: usize = 256;

/// Memory and passes of a hash: the first choice of OWASP's password storage cheat sheet.
const MEMORY_KIB: u32 = 19 * 1024;
const PASSES: u32 = 2;

/// Hashes at a time; each takes a core and [`MEMORY_KIB`].
const AT_A_TIME: usize = 2;

/// Longest wait for one's turn.
const TURN_MAX: Duration = Duration::from_secs(5);

/// What the password of nobody is checked against: it costs what a real one costs, and no password has this hash.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Attempts are counted over this time.
const WINDOW: Duration = Duration::from_secs(60);

/// Attempts in that time for a user from an address, from an address, and for a user from anywhere. The last is high, so that
/// nobody is kept out by others who guess.
const PAIR_MAX: u32 = 5;
const ADDRESS_MAX: u32 = 30;
const USER_MAX: u32 = 60;

/// Counters kept at a time. When there are more, somebody guesses from many addresses: nobody logs in until some are over.
const COUNTERS_MAX: usize = 20_000;

/// Checks passwords.
#[derive(Debug)]
pub(crate) struct Passwords {
    turns: Arc<Semaphore>,
    attempts: Mutex<Attempts>,
}

impl Default for Passwords {
    fn default() -> Self {
        Self {
            turns: Arc::new(Semaphore::new(AT_A_TIME)),
            attempts: Mutex::default(),
        }
    }
}

impl Passwords {
    /// A new password's hash.
    pub(crate) async fn hash(&self, password: Secret<String>) -> Result<PasswordHash, Refusal> {
        let length = password.expose().chars().count();
        if length < LENGTH_MIN || password.expose().len() > BYTES_MAX {
            let message = format!("the password has {length} characters");
            return Err(Refusal::new(Code::InvalidInput, message)
                .hint(format!("choose one of {LENGTH_MIN} characters to {BYTES_MAX} bytes")));
        }
        self.in_turn(move || hash(password.expose())).await?
    }

    /// Whether this is the password; `None` is the password of nobody, and takes as long.
    pub(crate) async fn is_right(&self, password: Secret<String>, of: Option<PasswordHash>) -> Result<bool, Refusal> {
        let known = of.is_some();
        let of = of.unwrap_or_else(|| PasswordHash(NOBODY.to_owned()));
        let right = self.in_turn(move || verify(password.expose(), &of)).await?;
        Ok(right && known)
    }

    /// Counts an attempt, before it is made: attempts side by side are counted too.
    pub(crate) fn attempt(&self, user: &Name, from: Option<IpAddr>) -> Result<(), Refusal> {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        if attempts.take(user, from, Instant::now()) {
            return Ok(());
        }
        let refusal = Refusal::new(
            Code::TooManyAttempts,
            format!("too many attempts to log in as {user} or from here"),
        );
        Err(refusal.hint("wait for a minute"))
    }

    /// An attempt was right: what went before it from there is forgotten.
    pub(crate) fn succeeded(&self, user: &Name, from: Option<IpAddr>) {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        attempts.counters.remove(&Counted::Pair(user.clone(), network(from)));
    }

    async fn in_turn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
        let overloaded = |message: &str| Refusal::new(Code::Overloaded, message).hint("try again in a few seconds");
        let turn = tokio::time::timeout(TURN_MAX, self.turns.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            return Err(overloaded("too many passwords are being checked"));
        };
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        done.await.map_err(|_| overloaded("the password could not be checked"))
    }
}

fn argon2() -> Argon2<'static> {
    let params = Params::new(MEMORY_KIB, PASSES, 1, None).expect("the parameters are within argon2's bounds");
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
}

fn hash(password: &str) -> Result<PasswordHash, Refusal> {
    let failed = |error: argon2::password_hash::Error| {
        Refusal::new(Code::Overloaded, format!("the password could not be hashed: {error}")).hint("try again")
    };
    // 122 random bits of the operating system: a salt has only to be unique.
    let salt = SaltString::encode_b64(Uuid::new_v4().as_bytes()).map_err(failed)?;
    let phc = argon2().hash_password(password.as_bytes(), &salt).map_err(failed)?;
    Ok(PasswordHash(phc.to_string()))
}

fn verify(password: &str, of: &PasswordHash) -> bool {
    if password.len() > BYTES_MAX {
        return false;
    }
    let phc = Phc::new(&of.0);
    // With the costs that stand in the hash: those of an older program count as well.
    phc.is_ok_and(|phc| argon2().verify_password(password.as_bytes(), &phc).is_ok())
}

/// What attempts are counted by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Counted {
    Pair(Name, IpAddr),
    Address(IpAddr),
    User(Name),
}

#[derive(Debug, Default)]
struct Attempts {
    counters: BTreeMap<Counted, (Instant, u32)>,
}

impl Attempts {
    /// Counts an attempt; `false`: it is one too many.
    fn take(&mut self, user: &Name, from: Option<IpAddr>, now: Instant) -> bool {
        let from = network(from);
        let counted = [
            (Counted::Pair(user.clone(), from), PAIR_MAX),
            (Counted::Address(from), ADDRESS_MAX),
            (Counted::User(user.clone()), USER_MAX),
        ];
        let is_over = |since: Instant| now.saturating_duration_since(since) >= WINDOW;
        if self.counters.len() + counted.len() > COUNTERS_MAX {
            self.counters.retain(|_, (since, _)| !is_over(*since));
            if self.counters.len() + counted.len() > COUNTERS_MAX {
                return false;
            }
        }
        let mut allowed = true;
        for (what, most) in counted {
            let (since, count) = self.counters.entry(what).or_insert((now, 0));
            if is_over(*since) {
                (*since, *count) = (now, 0);
            }
            *count = count.saturating_add(1);
            allowed &= *count <= most;
        }
        allowed
    }
}

/// Who has one IPv6 address has 2^64 of them.
fn network(from: Option<IpAddr>) -> IpAddr {
    match from.map(|from| from.to_canonical()) {
        None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Some(IpAddr::V4(address)) => IpAddr::V4(address),
        Some(IpAddr::V6(address)) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_password_matches_its_own_hash_only_and_each_hash_has_its_salt() {
        let (one, two) = (hash("correct horse").unwrap(), hash("correct horse").unwrap());
        assert_ne!(one, two);
        assert!(one.0.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{}", one.0);
        assert!(verify("correct horse", &one) && !verify("correct horsf", &one) && !verify("", &one));
    }

    #[tokio::test]
    async fn nobodys_password_costs_a_hash_and_is_never_right() {
        let passwords = Passwords::default();
        assert!(
            Phc::new(NOBODY).is_ok_and(|phc| phc.hash.is_some()),
            "it is checked, not refused"
        );
        let secret = || Secret::new("correct horse".to_owned());
        assert!(!passwords.is_right(secret(), None).await.unwrap());
        let known = passwords.hash(secret()).await.unwrap();
        assert!(passwords.is_right(secret(), Some(known)).await.unwrap());
        for wrong in ["short", &"x".repeat(257)] {
            let refusal = passwords.hash(Secret::new(wrong.to_owned())).await.unwrap_err();
            assert_eq!(refusal.code, Code::InvalidInput);
        }
    }

    #[test]
    fn attempts_are_bounded_per_user_and_address_and_a_window_later_allowed_again() {
        let mut attempts = Attempts::default();
        let start = Instant::now();
        let from = |n: u8| Some(IpAddr::from([192, 0, 2, n]));
        for _ in 0..PAIR_MAX {
            assert!(attempts.take(&name("alice"), from(1), start));
        }
        assert!(!attempts.take(&name("alice"), from(1), start));
        assert!(
            attempts.take(&name("alice"), from(2), start),
            "others can still come in as alice from elsewhere"
        );
        assert!(attempts.take(&name("alice"), from(1), start + WINDOW));
        let mut by_address = Attempts::default();
        let allowed = (0..100)
            .filter(|n| by_address.take(&name(&format!("u{n}")), from(1), start))
            .count();
        assert_eq!(allowed, ADDRESS_MAX as usize);
        let mut by_user = Attempts::default();
        let allowed = (0..200)
            .filter(|n| by_user.take(&name("alice"), from(*n), start))
            .count();
        assert_eq!(allowed, USER_MAX as usize);
        let mut of_net = Attempts::default();
        let v6 = |n: u128| Some(IpAddr::from(Ipv6Addr::from_bits((0x2001_0db8 << 96) + n)));
        let allowed = (0..100).filter(|n| of_net.take(&name("bob"), v6(*n), start)).count();
        assert_eq!(allowed, PAIR_MAX as usize, "one network counts as one");
    }

    #[test]
    fn counters_are_bounded_and_full_ones_let_nobody_in() {
        let mut attempts = Attempts::default();
        let start = Instant::now();
        let from = |n: u32| Some(IpAddr::from(Ipv4Addr::from_bits(n)));
        let allowed = (1..20_000)
            .filter(|n| attempts.take(&name(&format!("u{n}")), from(*n), start))
            .count();
        assert!(attempts.counters.len() <= COUNTERS_MAX && allowed < 7000);
        assert!(attempts.take(&name("alice"), from(1), start + WINDOW));
    }
}
