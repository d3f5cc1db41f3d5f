// Search: hides the prompts without all of the words, and counts the responses that are left.
const box = document.getElementById("search");
const groups = [...document.querySelectorAll(".group")];
const texts = groups.map(group => group.textContent.toLowerCase());
box.hidden = false;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  groups.forEach((group, index) =>
    group.classList.toggle("unmatched", !words.every(word => texts[index].includes(word))));
  const left = groups.filter(group => !group.classList.contains("unmatched"));
  const count = selector => left.reduce((sum, group) => sum + group.querySelectorAll(selector).length, 0);
  document.querySelectorAll("[data-kind]").forEach(label => {
    label.textContent = count(label.dataset.kind === "all" ? "article" : `article.${label.dataset.kind}`);
  });
  document.querySelectorAll("[data-groups]").forEach(label => {
    label.textContent = left.filter(group => group.classList.contains(label.dataset.groups)).length;
  });
});
