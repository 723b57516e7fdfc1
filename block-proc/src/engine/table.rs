//! A table of things with small numbers, of which the free ones are given out again.

/// See the module.
pub(super) struct Table<T>(Vec<Option<T>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Table<T> {
    /// Takes the smallest free number.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        let free = self.0.iter().position(Option::is_none);
        let place = free.unwrap_or(self.0.len());
        match free {
            Some(place) => self.0[place] = Some(value),
            None => self.0.push(Some(value)),
        }
        // As many as there are fds at most.
        place as u32
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        self.0.get_mut(number as usize)?.take()
    }

    /// # Panics
    /// When there is none: numbers come from [`Self::insert`] alone.
    pub(super) fn get(&self, number: u32) -> &T {
        self.0[number as usize].as_ref().expect("the file is open")
    }
}
