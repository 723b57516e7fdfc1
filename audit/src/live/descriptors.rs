//! Every descriptor of a process against those that it may hold: kind, rights, number, and who else holds the object or the
//! other end.

use super::check::{Found, Subject, differs, equal, held_by, unknown};
use super::declared::Holding;
use super::process::Descriptor;
use super::sockets;
use crate::policy::Process;

/// What a descriptor is, sockets told apart.
pub fn kind<'a>(descriptor: &'a Descriptor, sockets: &sockets::Sockets) -> &'a str {
    if descriptor.kind != "socket" {
        return &descriptor.kind;
    }
    sockets.of(&descriptor.link).map_or("socket", |socket| socket.kind)
}

/// One row for each that should not be there, or is missing; one row when all is as declared.
pub(super) fn check(of: &Subject<'_>) -> Vec<Found> {
    let descriptors = match &of.member.seen.descriptors {
        Ok(descriptors) => descriptors,
        Err(error) => return vec![unknown(error.clone())],
    };
    let mut found = Vec::new();
    let mut counts = vec![0; of.declared.descriptors.len()];
    for descriptor in descriptors {
        let kind = kind(descriptor, &of.machine.sockets);
        if kind == "socket" {
            found.push(unknown(format!(
                "{}: a socket that this caller cannot see",
                text(descriptor, kind)
            )));
            continue;
        }
        let fits = |(index, holding): &(usize, &Holding)| {
            holding.kind == kind
                && holding.rights.iter().any(|rights| rights == descriptor.rights)
                && (holding.at.is_empty() || holding.at.contains(&descriptor.number))
                && counts[*index] < holding.most
        };
        let Some((index, holding)) = of.declared.descriptors.iter().enumerate().find(fits) else {
            found.push(differs(format!("{} is not declared", text(descriptor, kind))));
            continue;
        };
        counts[index] += 1;
        found.extend(elsewhere(of, holding, descriptor).map(|problem| {
            let (state, why) = problem;
            (state, format!("{}: {why}", text(descriptor, kind)))
        }));
        if kind.starts_with("memfd:bulkhead-ram") && descriptor.mode.is_some_and(|mode| mode & 0o777 != 0) {
            found.push(differs(format!(
                "{}: its mode lets a holder open it anew with other rights",
                text(descriptor, kind)
            )));
        }
    }
    for (holding, count) in of.declared.descriptors.iter().zip(&counts) {
        if *count < holding.least {
            found.push(differs(format!(
                "{count} of {} ({}), must be at least {}",
                holding.kind, holding.why, holding.least
            )));
        }
    }
    if found.is_empty() {
        let kinds = of
            .declared
            .descriptors
            .iter()
            .zip(&counts)
            .filter(|(_, count)| **count > 0);
        let kinds: Vec<_> = kinds
            .map(|(holding, count)| format!("{count} {}", holding.kind))
            .collect();
        found.push(equal(format!("{}: {}", descriptors.len(), kinds.join(", "))));
    }
    found
}

fn text(descriptor: &Descriptor, kind: &str) -> String {
    let Descriptor {
        number, rights, link, ..
    } = descriptor;
    format!("fd {number}, {kind} {rights} ({link})")
}

fn same_object(one: &Descriptor, other: &Descriptor) -> bool {
    one.kind == other.kind && one.object == other.object
}

/// Whether the object, or the other end, is held by whom it must be.
fn elsewhere(of: &Subject<'_>, holding: &Holding, descriptor: &Descriptor) -> Option<Found> {
    if let Some(also) = holding.also.as_deref().and_then(Process::of_name) {
        let holds = held_by(of.machine, also).any(|other| {
            same_object(other, descriptor) && (holding.also_at.is_empty() || holding.also_at.contains(&other.number))
        });
        let readable = of.machine.of(also).all(|member| member.seen.descriptors.is_ok());
        if !holds {
            let name = also.name();
            return Some(if readable {
                let at = if holding.also_at.is_empty() {
                    ""
                } else {
                    " as its own standard input or output"
                };
                differs(format!("the {name} does not hold it{at}"))
            } else {
                unknown(format!("the {name}'s descriptors cannot be read"))
            });
        }
    }
    if let Some(apart) = holding.apart.as_deref().and_then(Process::of_name)
        && held_by(of.machine, apart).any(|other| same_object(other, descriptor))
    {
        return Some(differs(format!("{} holds it too", apart.name())));
    }
    let wanted = holding.peer.as_deref().and_then(Process::of_name)?;
    let peer = of.machine.sockets.of(&descriptor.link).and_then(|socket| socket.peer);
    let Some(peer) = peer else {
        return Some(differs("it is connected to nothing".to_owned()));
    };
    let holds = |held: &Descriptor| sockets::inode(&held.link) == Some(peer);
    let mut holders = of
        .machine
        .processes
        .iter()
        .filter(|member| member.seen.descriptors.as_ref().is_ok_and(|all| all.iter().any(holds)));
    let wrong = |member: &&super::find::Member| member.role != Some(wanted);
    if let Some(other) = holders.clone().find(wrong) {
        return Some(differs(format!(
            "{} {} holds its other end",
            other.name(),
            other.seen.pid
        )));
    }
    let unreadable = of.machine.of(wanted).any(|member| member.seen.descriptors.is_err());
    match holders.next() {
        Some(_) => None,
        None if unreadable => Some(unknown(format!("the {}'s descriptors cannot be read", wanted.name()))),
        None => Some(differs(format!("the {} does not hold its other end", wanted.name()))),
    }
}
