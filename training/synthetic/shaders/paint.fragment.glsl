// A person's skin with lips, brows, beard, hair shadow and shirt. Output: square root of the colour, and gloss.
in vec3 place;
in vec4 masks;  // lips, eyelids, inside of the mouth, face
out vec4 painted;
uniform vec3 skin, lip, hair, shirt, shirt2;
uniform vec4 brow;    // height, thickness, arch, strength
uniform vec4 beard;   // strengths of beard and hair shadow
uniform vec4 collar;  // depth, width, pattern
uniform vec4 marks;   // strengths of freckles, wrinkles, make-up, uneven colour
uniform vec4 moles[4];  // x, y, radius, strength

vec3 complexion(vec2 mirrored) {
    vec3 colour = skin * (1. + marks.w * .16 * (octaves(place * 9.) - .5));
    colour *= 1. + .10 * marks.w * (noise(place * 75.) - .5) * (noise(place * 140.) + .3);  // pores
    colour = mix(colour, colour * vec3(1.03, .96, .95), smoothstep(.45, .6, octaves(place * 3.)));
    float cheek = spot(mirrored, vec2(.47, 6.95), vec2(.26, .2)) * step(.5, place.z);
    colour = mix(colour, colour * vec3(1.07, .82, .80), .5 * cheek);
    float nose = spot(place.xy, vec2(0, 6.98), vec2(.16, .12)) * step(1., place.z);
    colour = mix(colour, colour * vec3(1.06, .87, .84), .35 * nose);
    float freckled = spot(mirrored, vec2(.3, 7.0), vec2(.42, .32)) + .25 * step(place.y, 8.);
    float freckle = smoothstep(.66, .76, noise(place * 38.) * .8 + noise(place * 75.) * .25) * step(.3, place.z);
    colour = mix(colour, colour * vec3(.72, .56, .46), clamp(.6 * marks.x * freckled * freckle, 0., .5));
    for (int i = 0; i < 4; i++) {
        float mole = 1. - smoothstep(.6, 1.1, length(place.xy - moles[i].xy) / moles[i].z);
        colour = mix(colour, colour * vec3(.4, .28, .24), mole * moles[i].w * step(.3, place.z));
    }
    float socket = spot(mirrored, vec2(.3, 7.28), vec2(.22, .12)) * step(.8, place.z);
    return mix(colour, colour * .62, .5 * socket);
}

float line(float away, float width) {  // a crease, darkest at its middle
    return gauss(away / width);
}

float wrinkles(vec2 mirrored) {  // 0 to 1, darkness of creases
    float rough = .03 * (noise(place * 6.) - .5), front = step(.5, place.z);
    float brow = 0.;
    for (int i = 0; i < 3; i++)
        brow += line(place.y - 7.70 - .095 * float(i) - rough * 2. + .05 * mirrored.x * mirrored.x, .012);
    brow *= smoothstep(.5, .3, mirrored.x) * (.5 + .5 * noise(vec3(place.x * 5., place.y * 11., 4.)));
    float frown = line(mirrored.x - .055 - rough, .011) * smoothstep(7.42, 7.47, place.y) * smoothstep(7.64, 7.56, place.y);
    vec2 corner = mirrored - vec2(.47, 7.27);
    float feet = line(abs(fract(atan(corner.y, corner.x) * 3.2 + .5) - .5) * length(corner), .009)
        * smoothstep(.02, .06, length(corner)) * smoothstep(.2, .12, length(corner)) * step(0., corner.x);
    float along = clamp((6.95 - place.y) / .4, 0., 1.);
    float fold = line(mirrored.x - mix(.18, .37, along) - rough, .02) * smoothstep(6.98, 6.90, place.y)
        * smoothstep(6.50, 6.62, place.y);
    float bag = line(place.y - 7.13 - .35 * pow(mirrored.x - .3, 2.) - rough * .5, .014) * smoothstep(.22, .1, abs(mirrored.x - .3));
    float neck = line(fract(place.y * 4. + rough * 6.) - .5, .05) * smoothstep(6.05, 5.95, place.y) * .6;
    return clamp((brow + frown + feet * .8 + fold * 1.1 + bag) * front + neck, 0., 1.);
}

float beard_here(vec2 mirrored) {
    float jaw = smoothstep(6.95, 6.75, place.y - .25 * smoothstep(.45, .75, mirrored.x))
        * smoothstep(5.95, 6.15, place.y + .25 * (place.z - 1.)) * smoothstep(.1, .45, place.z);
    float bare = .9 * spot(mirrored, vec2(.36, 6.84), vec2(.14, .17));
    float hairs = .75 + .5 * noise(place * vec3(70., 40., 60.));
    return clamp(jaw * (1. - bare) * beard.x * hairs, 0., .85);
}

float brow_here(float side) {
    float along = clamp((side - .12) / .46, 0., 1.);
    float middle = brow.x + brow.z * sin(clamp((side - .1) / .5, 0., 1.) * 2.6)
        - .10 * pow(clamp((side - .38) / .22, 0., 1.), 2.);
    float width = mix(brow.y, brow.y * .35, along);
    float inside = (1. - smoothstep(width * .4, width * 1.15, abs(place.y - middle)))
        * smoothstep(.07, .15, side) * (1. - smoothstep(.5, .6, side)) * step(.6, place.z);
    float hairs = .75 + .4 * noise(vec3(place.x * 70. + place.y * 60., place.y * 25., 3.));
    return clamp(inside * brow.w * hairs, 0., .9);
}

vec3 cloth(float edge) {
    float pattern = collar.z < .5 ? 0.
        : collar.z < 1.5 ? step(.5, fract(place.y * 5.))
        : collar.z < 2.5 ? step(.5, fract(place.x * 4. + .25))
        : step(.93, 1. - abs(place.x * 4.) * 2.);
    return mix(shirt, shirt2, pattern) * (.85 + .3 * octaves(place * 30.))
        * mix(.6, 1., smoothstep(0., .06, edge - place.y));
}

void main() {
    vec2 mirrored = vec2(abs(place.x), place.y);
    float gloss = mix(.35, .7, masks.x);
    vec3 colour = complexion(mirrored);
    // Young faces have the fold beside the nose too.
    float crease = wrinkles(mirrored) * (.12 + .75 * marks.y);
    colour *= mix(vec3(1), vec3(.55, .42, .38), .75 * crease);
    colour = mix(colour, hair * .6, beard_here(mirrored));
    colour = mix(colour, lip * (.9 + .2 * noise(vec3(place.x * 50., place.y * 8., 1.))), masks.x * .92);
    colour = mix(colour, colour * vec3(.84, .72, .70), masks.y * .7);
    float lid = masks.y * smoothstep(7.22, 7.30, place.y);
    colour = mix(colour, mix(colour, lip, .35) * vec3(.6, .5, .58), lid * marks.z * .7);
    float blush = spot(mirrored, vec2(.5, 7.0), vec2(.2, .13)) * step(.5, place.z);
    colour = mix(colour, colour * vec3(1.05, .72, .74), blush * marks.z * .6);
    colour = mix(colour, mix(hair * .6, skin * .25, .25), brow_here(mirrored.x));
    float shadow = beard.y * smoothstep(-.02, .16, above_hairline(place)) * step(6.6, place.y);
    colour = mix(colour, hair * .75, shadow);
    colour = mix(colour, vec3(.16, .04, .04), masks.z);
    if (masks.z > .5) gloss = .1;
    float edge = 6.02 - collar.x * gauss(mirrored.x / collar.y) * smoothstep(-.4, .4, place.z)
        - .10 * gauss(mirrored.x / .9);
    if (place.y < edge) {
        colour = cloth(edge);
        gloss = 0.;
    }
    painted = vec4(sqrt(colour), gloss);
}
